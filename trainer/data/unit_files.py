"""The files of an encoded unit: stream, bounds, hashes and progress.json as in ``unfinished.py``; found.json: what was left out."""

import json
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.files import write_json_atomic
from ..settings import DataSettings
from .chats import ChatEncoder, encode_rows
from .documents import without_blank
from .pieces import Unit
from .samples import Samples
from .tokens import encode_documents
from .unfinished import Unfinished
from .units import rows_of, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FOUND = "found.json"


@dataclass
class Findings:
    """What was left out of a text, or read in another way."""

    read: Counter[str] = field(default_factory=Counter)
    """By the readers of documents."""
    encoded: Counter[str] = field(default_factory=Counter)
    """By the encoder of documents."""
    samples: Samples = field(default_factory=Samples)
    """Of conversations."""

    def add(self, unit: Path) -> None:
        """Adds what was found in the unit behind these; its folder is complete."""
        found = json.loads((unit / _FOUND).read_text())
        self.read.update(found.get("read", {}))
        self.encoded.update(json.loads((unit / "progress.json").read_text())["notes"])
        if samples := found.get("samples"):
            reasons, notes = (Counter(samples[name]) for name in ("reasons", "notes"))
            self.samples.add(Samples(samples["read"], samples["bad"], samples["first_bad"], reasons=reasons, notes=notes))


def encode_unit(unit: Unit, settings: DataSettings, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Writes the files of a unit into an empty folder.

    Raises:
        UserError: a file cannot be read, or the tokenizer does not fit the text.
    """
    with closing(Unfinished(folder)) as work:
        found = (_encode_chats if settings.kind == "chat" else _encode_texts)(unit, settings, tokenizer, work)
        work.save(now=True)
    write_json_atomic(folder / _FOUND, found)


def is_whole(folder: Path) -> bool:
    """Whether the files of a unit have the sizes that it names."""
    try:
        progress = json.loads((folder / "progress.json").read_text())
        sizes = {"stream": 4 * progress["tokens"], "bounds": 8 * progress["documents"], "hashes": 8 * progress["documents"]}
        return (folder / _FOUND).exists() and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _encode_texts(unit: Unit, settings: DataSettings, tokenizer: "PreTrainedTokenizerBase", work: Unfinished) -> dict[str, Any]:
    notes: Counter[str] = Counter()
    documents = without_blank(texts_of(unit, settings.text_field, notes), notes)
    # rank 0 tells how many units are done
    encode_documents(documents, tokenizer, work, say=lambda _: None, need_end=settings.packing, control=settings.reads_control_tokens)
    return {"read": notes}


def _encode_chats(unit: Unit, settings: DataSettings, tokenizer: "PreTrainedTokenizerBase", work: Unfinished) -> dict[str, Any]:
    # all reasons by name: which ones are summed up depends on the units before
    samples = Samples(most_reasons=None)
    encoder = ChatEncoder(tokenizer, mask_prompts=settings.mask_prompts, control=settings.reads_control_tokens, notes=samples.notes)
    encode_rows(rows_of(unit), encoder, work.write, work.bounds, work.hashes, samples=samples, seq_length=settings.seq_length)
    # not by asdict, which would count the pairs of a Counter
    counts = {name: dict(getattr(samples, name)) for name in ("reasons", "notes")}
    return {"samples": {"read": samples.read, "bad": samples.bad, "first_bad": samples.first_bad, **counts}}
