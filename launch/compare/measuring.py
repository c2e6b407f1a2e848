"""Measures several models on one text, each against the first, and says which of them it cannot tell apart."""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...models.common.cache_folder import cache_dir
from ...models.common.errors import UserError
from ...models.folder.loading import find_model_folder
from ...models.teachers import LocalTeacher
from ...models.tokenizer.vocabulary import check_same_vocabulary, effective_vocab, embedding_rows
from ...qat.footprint import bits_per_weight, folder_bytes, packed_bytes
from ...qat.runtimes.transformers_process import generation_speed
from ...trainer.data.documents import read_documents
from ...trainer.data.known_ids import check_rows
from ...trainer.data.prepared_data import PreparedData, prepare_data
from ...trainer.evaluation.model_row import is_existing_export, measure_model, quant_record
from ...trainer.evaluation.spread import is_clear, paired_error
from ..answers.opened import Opened, open_for_answers

if TYPE_CHECKING:
    from ...trainer.data.documents import Documents
    from ...trainer.settings import DataSettings

Row = dict[str, Any]
Score = Callable[[Opened, PreparedData], dict[str, Row]]
"""Gives the scores of a model on tasks, by the name of the task, as rows (``TaskScore.row``)."""
_FIGURES = {"perplexity": "nll", "KL": "kl"}
"""What models are told apart by -> its sums over blocks."""


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """The first model, with which the others are compared."""

    opened: Opened
    data: PreparedData
    row: Row


def compare_models(
    paths: Sequence[str], text: "DataSettings", *, score: Score | None = None, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The comparison as plain data: ``protocol``, ``models`` (a row each, the first is the reference) and ``notes`` (a sentence each).

    Two models are in memory at once, in fp32.

    Args:
        paths: Model folders, hub ids or exports.
        text: The text; nothing is kept for training.
        score: Scores each model on tasks.
        say: Gets a line before each model.

    Raises:
        UserError: a model or the text cannot be read, or a window is longer than a model's context.
    """
    # read once: every model gets the same documents, cut by its own tokenizer
    documents = read_documents(text)
    first: _Reference | None = None
    rows: list[Row] = []
    notes: list[str] = []
    for path in paths:
        say(f"measuring {path}")
        row, opened, data = _measure(path, text, documents, first, notes)
        if score is not None:
            row["tasks"] = score(opened, data)
        rows.append(row)
        if first is None:
            first = _Reference(opened=opened, data=data, row=row)
        # before the next one is opened, so that only the reference stays beside it
        del opened
        gc.collect()
    assert first is not None, "there is at least one model"
    _name_apart(rows)
    if any(row["kl_left_out"] for row in rows):
        notes.append("perplexities of models with different vocabularies are per token of each: compare bits per byte")
    else:
        # with one vocabulary both figures say the same
        rows = [{key: value for key, value in row.items() if key != "bits_per_byte"} for row in rows]
    notes += indistinct(rows)
    windows = first.data.evaluation
    protocol = {
        "text": first.data.description,
        "text_hash": first.data.fingerprint,
        "context": windows.seq_length,
        "tokens": windows.tokens,
        "blocks": len(rows[0]["blocks"]["tokens"]),
        "dtype": "float32",
    }
    return {"protocol": protocol, "models": rows, "notes": notes}


def _measure(
    path: str, text: "DataSettings", documents: "Documents", first: _Reference | None, notes: list[str]
) -> tuple[Row, Opened, PreparedData]:
    opened = open_for_answers(path)
    if opened.context is not None and opened.context < text.seq_length:
        raise UserError(
            f"{path} has a context of {opened.context:,} tokens, fewer than a window of {text.seq_length:,}; lower --seq-length"
        )
    reason, teacher, data = "", None, None
    if first is not None:
        # KL compares probabilities id by id, so ids must mean the same tokens (law 2, docs/architecture.md)
        try:
            check_same_vocabulary(first.opened.tokenizer, opened.tokenizer)
        except UserError:
            sizes = [len(one.tokenizer.get_vocab()) for one in (first.opened, opened)]
            reason = f"its vocabulary ({sizes[1]:,} tokens) is not that of {first.row['name']} ({sizes[0]:,})"
            notes.append(f"{opened.name}: no KL and no top-1 agreement, because {reason}")
        else:
            # no more ids than both heads have rows for
            rows = (embedding_rows(first.opened.model.config), embedding_rows(opened.model.config))
            teacher = LocalTeacher(first.opened.model, v_eff=effective_vocab(opened.tokenizer, *rows), name=first.row["name"])
            data = first.data
    # a vocabulary of its own gives windows of its own, over the same documents
    data = data or prepare_data(text, opened.tokenizer, cache_dir(), documents=documents, train=False)
    check_rows(data, opened.tokenizer, opened.v_eff)
    row: Row = {"name": opened.name, "path": path, **measure_model(opened.model, teacher, data.evaluation)}
    row |= _sizes(path, opened, row["parameters"])
    perplexity = row["eval"]["perplexity"]
    # per token to per byte, which does not depend on the vocabulary
    tokens_per_byte = data.evaluation.tokens / max(1, _text_bytes(opened, data))
    row["bits_per_byte"] = math.log2(perplexity) * tokens_per_byte if math.isfinite(perplexity) else None
    row["kl_left_out"] = reason
    # from a single token, so that no prompt has to be read
    row["tokens_per_second"] = generation_speed(opened.model, torch.tensor([[_first_token(data)]], device=opened.model.device))
    return row, opened, data


def _first_token(data: PreparedData) -> int:
    return int(data.evaluation[0]["input_ids"][0])


def _text_bytes(opened: Opened, data: PreparedData) -> int:
    """Bytes (UTF-8) of the text that was measured on."""
    total = 0
    for index in range(len(data.evaluation)):
        window = data.evaluation[index]
        # padding is no text
        ids = window["input_ids"][window["attention_mask"] == 1].tolist()
        total += len(str(opened.tokenizer.decode(ids, skip_special_tokens=True)).encode())
    return total


def _sizes(path: str, opened: Opened, parameters: int) -> Row:
    """Bytes of the weight files, and of the model as it is served where a folder holds codes beside fp32 weights."""
    # what is not here is a hub id: its files lie in the hub's cache
    place = Path(path) if Path(path).exists() else find_model_folder(path, None, weights=True)
    size = folder_bytes(place)
    # an export's files are packed already
    quant = None if is_existing_export(str(place)) else quant_record(str(place))
    packed = size if quant is None else packed_bytes(opened.model, quant)
    return {
        "bytes": size,
        "packed_bytes": packed,
        "bits_per_weight": bits_per_weight(size, parameters),
        "packed_bits_per_weight": bits_per_weight(packed, parameters),
    }


def _name_apart(rows: Sequence[Row]) -> None:
    """Models with the same name get their path, or a number where that is the same too."""
    names = [row["name"] for row in rows]
    for row in rows:
        if names.count(row["name"]) > 1:
            row["name"] = row["path"]
    names = [row["name"] for row in rows]
    for number, row in enumerate(rows, 1):
        if names.count(row["name"]) > 1:
            row["name"] = f"{row['name']} ({number})"


def indistinct(rows: Sequence[Row]) -> list[str]:
    """A sentence for each pair of models whose difference chance explains, and one where there are no errors at all.

    Args:
        rows: With ``name``, ``eval`` and ``blocks``. Rows that were measured on other tokens are not paired.
    """
    # an error takes at least two blocks
    if rows and len(rows[0]["blocks"]["tokens"]) < 2:
        return ["the text fills one block, so nothing is known about errors; give more text"]
    said = []
    for at, one in enumerate(rows):
        for other in rows[at + 1 :]:
            same, unclear = [], []
            for word, figure in _FIGURES.items():
                error = paired_error(one["blocks"], other["blocks"], figure)
                difference = _difference(one["eval"], other["eval"], figure)
                if error is None or difference is None or is_clear(difference, error):
                    continue
                # not a single block differs
                if difference == error == 0:
                    same.append(word)
                else:
                    # a difference of mean log-likelihoods is the logarithm of a ratio of perplexities
                    amount = f"{math.expm1(difference):+.2%} ±{error:.2%}" if figure == "nll" else f"{difference:+.4f} ±{error:.4f} nats"
                    unclear.append(f"{word} ({amount})")
            pair = f"{one['name']} and {other['name']}"
            said += [f"{pair} have the same {' and '.join(same)} on this text"] if same else []
            said += [f"{pair} cannot be told apart on this text by their {' and '.join(unclear)}"] if unclear else []
    return said


def _difference(one: Row, other: Row, figure: str) -> float | None:
    """Of mean log-likelihoods, or of KLs, in nats."""
    if figure == "kl":
        return None if one.get("kl") is None or other.get("kl") is None else other["kl"] - one["kl"]
    # an infinite perplexity has no ratio to another
    ratio = other["perplexity"] / one["perplexity"] if math.isfinite(other["perplexity"]) and math.isfinite(one["perplexity"]) else 0
    return math.log(ratio) if ratio > 0 else None
