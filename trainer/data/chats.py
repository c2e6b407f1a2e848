"""Conversations: rows of ``messages``, or of ``prompt`` and ``completion``, through the tokenizer's chat template, prompts not predicted.

A token that is not to be predicted is stored as ``-1 - id``, so that windows need no second file.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...models.errors import UserError
from .tokens import TokenStream
from .windows import DTYPE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_BAD = 0.1
"""Share of bad samples beyond which the data as a whole is refused."""
_FIELDS = ("messages", "prompt", "completion")


@dataclass
class Samples:
    """How many samples were read, and how many of them were left out because something is wrong with them."""

    read: int = 0
    bad: int = 0
    first_bad: str = ""

    def refuse(self, why: str) -> None:
        """Count a bad one."""
        self.bad += 1
        self.first_bad = self.first_bad or why

    def check(self) -> None:
        """Raise UserError when too many are bad, or none is good."""
        if self.bad > MOST_BAD * self.read or self.bad == self.read:
            raise UserError(
                f"data: {self.bad:,} of {self.read:,} conversations cannot be used; the first: {self.first_bad}. Rows need 'messages' (a "
                "list of role and content) or 'prompt' and 'completion'"
            )


def write_chats(
    rows: Iterable[tuple[str, Mapping[str, Any]]], tokenizer: "PreTrainedTokenizerBase", path: Path, *, mask_prompts: bool, samples: Samples
) -> TokenStream:
    """Encode conversations into the file ``path``.

    Args:
        rows: (where it is from, row).
        mask_prompts: Predict what the assistant says and nothing else.
        samples: Counts them.

    Raises:
        UserError: more than ``MOST_BAD`` of them are bad.
    """
    bounds, hashes, total = array("q", [0]), array("Q"), 0
    with path.open("wb") as file:
        for where, row in rows:
            samples.read += 1
            try:
                ids, predicted = encode_chat(row, tokenizer)
            except ValueError as error:
                samples.refuse(f"{where}: {error}")
                continue
            values = np.array(ids, dtype=DTYPE)
            if mask_prompts:
                values = np.where(np.array(predicted), values, -1 - values).astype(DTYPE)
            file.write(values.data)
            total += len(ids)
            bounds.append(total)
            text = json.dumps([row.get(field) for field in _FIELDS], sort_keys=True, ensure_ascii=False)
            hashes.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
    samples.check()
    tokens = np.memmap(path, dtype=DTYPE, mode="r") if total else np.empty(0, dtype=DTYPE)
    return TokenStream(tokens, np.frombuffer(bounds, dtype=np.int64), np.frombuffer(hashes, dtype=np.uint64))


def encode_chat(row: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[bool]]:
    """(token ids, whether each is the assistant's) of a row.

    Which characters are the assistant's is found by rendering the conversation up to each of its turns; no ``{% generation %}`` marks are
    needed in the template.

    Raises:
        ValueError: the row is no conversation, has no turn of the assistant, or the template does not render its turns one by one.
    """
    messages = row.get("messages")
    if messages is None:
        prompt, completion = row.get("prompt"), row.get("completion")
        if prompt is None and completion is None:
            raise ValueError("neither 'messages' nor 'prompt' and 'completion'")
        if isinstance(prompt, str) and isinstance(completion, str) and not tokenizer.chat_template:
            end = tokenizer.eos_token if isinstance(tokenizer.eos_token, str) else ""
            return _marked(prompt + completion + end, [(len(prompt), len(prompt + completion + end))], tokenizer)
        messages = [*_turns(prompt, "user"), *_turns(completion, "assistant")]
    messages = _checked(messages)
    if not tokenizer.chat_template:
        raise UserError(
            "data.kind: chat needs a tokenizer with a chat template, and this one has none; use the instruct model's tokenizer, or rows of "
            "'prompt' and 'completion' as plain text"
        )
    whole = _render(messages, tokenizer)
    spans = [_span(messages, turn, whole, tokenizer) for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if not spans:
        raise ValueError("no turn of the assistant")
    return _marked(whole, spans, tokenizer)


def _turns(value: Any, role: str) -> list[Any]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value if isinstance(value, list) else [None]


def _checked(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("neither 'messages' nor 'prompt' and 'completion'")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message without a role: {str(message)[:80]}")
    return messages


def _render(messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", *, prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"the chat template refuses it: {error}") from error
    return text


def _span(messages: list[dict[str, Any]], turn: int, whole: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, int]:
    """Where the assistant's turn begins and ends in the rendered text."""
    before, after = _render(messages[:turn], tokenizer, prompt=True), _render(messages[: turn + 1], tokenizer)
    if not (whole.startswith(before) and whole.startswith(after)):
        raise ValueError("the chat template renders earlier turns differently once later ones are there; split the conversation")
    return len(before), len(after)


def _marked(text: str, spans: list[tuple[int, int]], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[bool]]:
    """Ids of ``text``, and whether each token's characters lie in one of ``spans``."""
    told: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    inside = [any(first <= begin and end <= last for first, last in spans) and end > begin for begin, end in told["offset_mapping"]]
    if not any(inside[1:]):
        raise ValueError("nothing that the assistant says")
    return told["input_ids"], inside


def rows_of_jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file and line, row) of a .jsonl file; a line that is no object is an empty row, so that it counts as bad."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield f"{path.name}:{number}", row if isinstance(row, dict) else {}


def rows_of_parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file and row, row) of a .parquet file; columns other than those of conversations are not read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in _FIELDS]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}, row {number}", row
    except pa.ArrowException as error:
        raise UserError(f"data.files: {path} is not a whole Parquet file ({str(error).splitlines()[0]}); make or fetch it again") from error
