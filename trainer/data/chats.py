"""Encodes rows of conversations by the tokenizer's chat template; prompts are not predicted, and omissions are counted by reason.

A token that is not predicted is stored as ``-1 - id``, so that windows need no second file.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...models.common.errors import UserError
from .conversations import COLUMNS, Conversation, NothingToLearnError, map_strings, read_conversation
from .encoding import Encoder
from .file_documents import whole_text
from .file_rows import Row
from .file_rows import parquet_rows as rows_of_parquet
from .file_rows import read_rows as rows_of_jsonl
from .rendering import Sample, samples_of
from .samples import MOST_BAD, Samples
from .tokens import TokenStream, mapped_tokens
from .windows import DTYPE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MOST_BAD", "ChatEncoder", "Samples", "encode_chat", "encode_rows", "rows_of_jsonl", "rows_of_parquet", "write_chats"]

FORMAT = 2
"""Version of the encoding; raise it whenever the same rows would give other tokens."""
# columns of the first version, whose hashes must stay as they are, see _digest
_FIRST_COLUMNS = ("messages", "prompt", "completion")


class ChatEncoder:
    """Encodes rows.

    Args:
        tokenizer: A fast tokenizer.
        mask_prompts: Predict only the assistant's turns.
        control: Whether control tokens that messages spell are read as control tokens; if not, they are text.
        notes: Counts what is cut, replaced or not learned.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        mask_prompts: bool = True,
        control: bool = False,
        notes: Counter[str] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.notes: Counter[str] = Counter() if notes is None else notes
        self.mask_prompts, self._control = mask_prompts, control
        self._encoder = Encoder(tokenizer)

    def encode(self, row: Mapping[str, Any]) -> list[tuple[list[int], list[bool]]]:
        """(token ids, whether each is learned) per sample of the row; one sample, unless the template rewrites earlier turns.

        Raises:
            ValueError: the row is not a conversation, the template refuses it, or no token of it is to be learned.
            UserError: the tokenizer has no chat template.
        """
        samples, mark = self._samples(row)
        encoded = [self._encoder.encode(sample, mark) for sample in samples]
        # without the first token, which nothing predicts
        if not any(any(learned[1:]) for _, learned in encoded):
            raise ValueError("no token of the assistant's turns can be learned")
        return encoded

    def _samples(self, row: Mapping[str, Any]) -> tuple[list[Sample], str]:
        if not self.tokenizer.chat_template:
            return self._without_template(row)
        try:
            return self._render(read_conversation(row))
        except NothingToLearnError:
            raise
        except ValueError:
            # some templates concatenate the arguments of tool calls with text, so they need them as text
            # servers give arguments as objects, so that form comes first
            plain = read_conversation(row, arguments="text")
            if plain == read_conversation(row):
                raise
            return self._render(plain)

    def _render(self, conversation: Conversation) -> tuple[list[Sample], str]:
        # put in before rendering: afterwards the control tokens of messages and of the template look the same
        mark = self._mark(conversation.strings)
        if mark:
            conversation = replace(
                conversation,
                messages=map_strings(conversation.messages, lambda text: self._encoder.marked(text, mark), ("role", "type")),
                tools=map_strings(conversation.tools, lambda text: self._encoder.marked(text, mark), ("type",)),
            )
        return samples_of(conversation, self.tokenizer, self.notes, everything=not self.mask_prompts), mark

    def _without_template(self, row: Mapping[str, Any]) -> tuple[list[Sample], str]:
        """The sample of a tokenizer without a template: prompt and completion concatenated as they are."""
        prompt, completion = row.get("prompt"), row.get("completion", row.get("response"))
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise UserError(
                "data.kind: chat needs a tokenizer with a chat template, and this one has none; use the instruct model's tokenizer, or "
                "rows of 'prompt' and 'completion' as plain text"
            )
        # the end is learned too: without it the student would not stop
        end = self.tokenizer.eos_token if isinstance(self.tokenizer.eos_token, str) else ""
        if mark := self._mark([prompt, completion]):
            prompt, completion = self._encoder.marked(prompt, mark), self._encoder.marked(completion, mark)
        text = prompt + completion + end
        return [Sample(text, [(len(prompt) if self.mask_prompts else 0, len(text))])], mark

    def _mark(self, strings: list[str]) -> str:
        # '' unless a string spells a control token, so that most conversations need no second tokenizer
        mark = self._encoder.mark_for(strings)
        if mark:
            read_as = "control tokens" if self._control else "text"
            self.notes[f"conversations that spell control tokens, which are read as {read_as} (data.special_tokens)"] += 1
        return "" if self._control else mark


def encode_chat(row: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase", **more: Any) -> tuple[list[int], list[bool]]:
    """(token ids, whether each is learned) of a row, its samples concatenated; ``more`` as for ``ChatEncoder``.

    Raises:
        ValueError, UserError: as ``ChatEncoder.encode``.
    """
    samples = ChatEncoder(tokenizer, **more).encode(row)
    return [token for ids, _ in samples for token in ids], [own for _, learned in samples for own in learned]


def write_chats(
    rows: Iterable[Row],
    tokenizer: "PreTrainedTokenizerBase",
    path: Path,
    *,
    mask_prompts: bool,
    samples: Samples,
    control: bool = False,
    seq_length: int | None = None,
) -> TokenStream:
    """Encodes conversations into the file ``path``.

    Args:
        rows: (place of the row, the row or the error that it cannot be read).
        tokenizer: A fast tokenizer.
        path: File for the token ids, int32.
        mask_prompts: Predict only the assistant's turns.
        samples: Counts rows and omissions.
        control: Whether control tokens that messages spell are read as control tokens.
        seq_length: Tokens per window; longer samples are counted.

    Raises:
        UserError: more than ``MOST_BAD`` of the rows are bad, or the tokenizer cannot render or encode any.
    """
    bounds, hashes = array("q", [0]), array("Q")
    with path.open("wb") as file:
        encoder = ChatEncoder(tokenizer, mask_prompts=mask_prompts, control=control, notes=samples.notes)
        encode_rows(rows, encoder, file.write, bounds, hashes, samples=samples, seq_length=seq_length)
    # after the last row, when the share of bad rows is known; the file is temporary until the caller commits it
    samples.check()
    return TokenStream(mapped_tokens(path), np.frombuffer(bounds, dtype=np.int64), np.frombuffer(hashes, dtype=np.uint64))


def encode_rows(
    rows: Iterable[Row],
    encoder: ChatEncoder,
    write: Callable[[memoryview], Any],
    bounds: "array[int]",
    hashes: "array[int]",
    *,
    samples: Samples,
    seq_length: int | None,
) -> None:
    """Encodes conversations, without a look at the share of bad ones.

    Args:
        rows, samples, seq_length: As for ``write_chats``.
        encoder: Encodes a row.
        write: Called with the int32 ids of each sample.
        bounds: The end of each sample is added; the last number in it is where the first one begins.
        hashes: The hash of each sample's conversation is added.

    Raises:
        UserError: the tokenizer cannot render or encode any.
    """
    total = bounds[-1]
    for where, given in rows:
        samples.read += 1
        try:
            row = _whole_row(given, samples.notes)
            encoded = encoder.encode(row)
        except UserError:
            # one unreadable row is counted; an error about the tokenizer concerns all rows
            if not isinstance(given, UserError):
                raise
            samples.refuse(where, "a row that cannot be read")
            continue
        except NothingToLearnError:
            samples.notes["conversations of which no turn is to be learned (weight 0)"] += 1
            continue
        except ValueError as error:
            samples.refuse(where, str(error))
            continue
        # one hash for all samples of a conversation, so that the split never puts them on different sides
        digest = _digest(row)
        if len(encoded) > 1:
            samples.notes["further samples, of turns that the chat template rewrites later on"] += len(encoded) - 1
        for ids, learned in encoded:
            values = np.array(ids, dtype=DTYPE)
            # without masking every token is learned, so none is stored as negative
            if encoder.mask_prompts:
                values = np.where(np.array(learned), values, -1 - values).astype(DTYPE)
            write(values.data)
            total += len(ids)
            # each sample is a document of its own in the stream
            bounds.append(total)
            hashes.append(digest)
            if seq_length is not None and len(ids) > seq_length:
                samples.notes["samples longer than a window (data.seq_length), which are cut"] += 1


def _whole_row(row: Mapping[str, Any] | UserError, notes: Counter[str]) -> Mapping[str, Any]:
    if isinstance(row, UserError):
        raise row
    return map_strings(dict(row), lambda text: whole_text(text, notes))


def _digest(row: Mapping[str, Any]) -> int:
    """Hash of the conversation's text, by which the split chooses; the same on every machine."""
    # the other columns only where there are some, so that the hashes of older data stay
    facts: list[Any] = [row.get(column) for column in _FIRST_COLUMNS]
    others = {column: row[column] for column in COLUMNS if column not in _FIRST_COLUMNS and row.get(column) is not None}
    text = json.dumps([*facts, others] if others else facts, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")
