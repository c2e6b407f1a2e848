"""Text that a model of the recipe has written (``data.generate``), in ``<cache>/generated/<key>/``: one JSON file for each batch.

The key is a hash of the model and the sampling, not of the amount of text: a run that wants more goes on where the last one ended.
"""

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...models.common.errors import UserError
from ...models.common.files import sha256_json, write_json_atomic
from ...models.common.locks import waiting_for
from ..settings import DataSettings
from ..settings_generation import GenerateSettings
from .documents import Documents
from .file_rows import Row
from .sampling import TextWriter, WrittenBatch, writes_chats
from .tokens import tokenizer_hash

FORMAT = 2
"""Version of the sampling; raise it whenever the same settings would give other text."""
_MOST_EMPTY = 8
"""Batches without a single row after which the model is taken not to write at all."""
_REPORT_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class WritingModel:
    """The model that writes."""

    name: str
    """Name for messages."""
    content: str
    """Hash of its weights and config."""
    tokenizer: Any
    load: Callable[[], tuple[Any, int]]
    """Loads it: (the model on its device, size of the real vocabulary). Called only when text is missing."""


def generated_documents(settings: DataSettings, writer: WritingModel, cache: Path, seed: int, say: Callable[[str], None]) -> Documents:
    """The text of ``settings.generate``, written as far as it is not in the cache (rank 0).

    Args:
        settings: ``kind`` decides whether conversations are handed out as rows, or rendered by the chat template as documents.
        writer: The model.
        cache: The cache folder.
        seed: Seed of the run.
        say: Called with a line about the progress every ten seconds.

    Raises:
        UserError: see ``TextWriter``; the model writes nothing.
    """
    asked = settings.generate
    assert asked is not None
    chat = writes_chats(asked, writer.tokenizer)
    if settings.kind == "chat" and not chat:
        raise UserError(f"data.kind is 'chat', and {writer.name} has no chat template to write conversations in; use kind: text")
    folder = cache / "generated" / _key(asked, writer, seed)
    with waiting_for(folder.with_name(f"{folder.name}.making"), "writes the same text", say):
        parts, counts = _written(asked, writer, folder, seed, say)
    digest = hashlib.sha256(b"".join(hashlib.sha256(part.read_bytes()).digest() for part in parts))
    digest.update(f"{settings.kind} {chat}".encode())
    what = "conversations" if chat else "documents"
    named = f"{counts.tokens:,} tokens that {writer.name} wrote ({len(counts.rows):,} {what}, {counts.cut:,} cut at the limit)"
    rows = counts.rows
    notes = Counter({f"{what} that {writer.name} left empty": counts.empty} if counts.empty else {})
    if settings.kind == "chat":
        return Documents(named, digest.hexdigest(), tuple, lambda: _numbered(rows), notes)
    texts = [_rendered(row, writer.tokenizer) if chat else str(row["text"]) for row in rows]
    return Documents(named, digest.hexdigest(), lambda: texts, passed=notes)


def _key(asked: GenerateSettings, writer: WritingModel, seed: int) -> str:
    sampling = {name: value for name, value in asdict(asked).items() if name not in ("tokens", "model")}
    facts = {"format": FORMAT, "model": writer.content, "tokenizer": tokenizer_hash(writer.tokenizer), "seed": seed}
    return sha256_json({**facts, "chat_template": writer.tokenizer.chat_template, **sampling})


def _written(
    asked: GenerateSettings, writer: WritingModel, folder: Path, seed: int, say: Callable[[str], None]
) -> tuple[list[Path], WrittenBatch]:
    """The files of enough batches in order, and all their rows with the counts."""
    parts: list[Path] = []
    total = WrittenBatch()
    maker: TextWriter | None = None
    progress = _Progress(asked.tokens, say)
    for index in itertools.count():
        if total.tokens >= asked.tokens:
            return parts, total
        if index >= _MOST_EMPTY and not total.rows:
            raise UserError(f"data.generate: {writer.name} ends every text at its first token; give data.files, or another start")
        part = folder / f"{index:06}.json"
        batch = _read(part)
        if batch is None:
            if maker is None:
                say(f"{writer.name} writes {asked.tokens - total.tokens:,} tokens of text")
                model, v_eff = writer.load()
                maker = TextWriter(model, writer.tokenizer, asked, seed, v_eff, progress.step)
                progress.start(total.tokens)
            batch = maker.batch(index)
            write_json_atomic(part, asdict(batch))
        parts.append(part)
        total.rows += batch.rows
        total.tokens, total.cut, total.empty = total.tokens + batch.tokens, total.cut + batch.cut, total.empty + batch.empty
    raise AssertionError("itertools.count() never ends")


class _Progress:
    """Says every ten seconds how far the writing is, inside a batch too: on a CPU one takes minutes."""

    def __init__(self, tokens: int, say: Callable[[str], None]) -> None:
        self._tokens, self._say = tokens, say
        self._before = self._fresh = 0
        self._began = self._said = time.monotonic()

    def start(self, before: int) -> None:
        """The first batch begins; ``before`` tokens were there already."""
        self._before = before
        self._began = self._said = time.monotonic()

    def step(self, rows: int) -> None:
        """A step of the sampling made ``rows`` texts one token longer."""
        self._fresh += rows
        now = time.monotonic()
        if now - self._said > _REPORT_SECONDS:
            self._said = now
            done, rate = self._before + self._fresh, self._fresh / (now - self._began)
            # texts of the last batch are written to their ends: a cut text would teach the student to stop there
            last = ", texts of the last batch are being finished" if done > self._tokens else ""
            self._say(f"{done:,} of {self._tokens:,} tokens written ({rate:,.0f} tokens/s){last}")


def _read(part: Path) -> WrittenBatch | None:
    """A batch from its file; None when there is none, or it is not one: then it is written again."""
    try:
        batch = WrittenBatch(**json.loads(part.read_text(encoding="utf-8")))
        counts = (batch.tokens, batch.cut, batch.empty)
        whole = all(type(count) is int and count >= 0 for count in counts) and all(isinstance(row, dict) for row in batch.rows)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return batch if whole else None


def _numbered(rows: list[dict[str, Any]]) -> Iterator[Row]:
    return ((f"conversation {number}", row) for number, row in enumerate(rows, 1))


def _rendered(row: dict[str, Any], tokenizer: Any) -> str:
    """A conversation as text, without the begin-of-text and end-of-text tokens, which tokenizing puts around every document."""
    text = str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    if isinstance(tokenizer.bos_token_id, int) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        text = text.removeprefix(str(tokenizer.bos_token))
    return text.rstrip().removesuffix(str(tokenizer.eos_token)) if tokenizer.eos_token else text
