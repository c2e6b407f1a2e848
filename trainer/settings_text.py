"""Settings of one text and how it is read, alone (``data``) or as a part of a blend (``data.blend``)."""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal

from .. import Bounds, Count, check_fields
from ..parts import Part
from .settings_generation import GenerateSettings

SOURCES = ("builtin", "files", "hub", "generate", "source")
"""Keys that name a text."""
PART_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Where a text comes from, and how it is read."""

    exactly_one: ClassVar[tuple[str, ...]] = SOURCES
    part: ClassVar[Part | None] = None
    """The data source that ``source`` names; set by the subclass that ``configs/own_settings.py`` makes for it."""

    builtin: Literal["python-stdlib"] | None = None
    """Text that every machine has: the sorted .py files of the running Python's standard library, first 8 MB."""
    files: tuple[str, ...] | None = None
    """Local files (txt, md, jsonl, json, csv, tsv, parquet; also compressed with gz, bz2, xz or zst), globs or folders."""
    hub: str | None = None
    """Hugging Face dataset id."""
    hub_config: str | None = None
    """Configuration name of the hub dataset."""
    hub_split: str = "train"
    """Split of the hub dataset."""
    hub_shards: bool = False
    """Read the hub dataset over the network, shard by shard and each once, and keep only its tokens: for text that the disk cannot hold.
    All ranks share the shards. Otherwise it is downloaded whole first."""
    generate: GenerateSettings | None = None
    """Text that the recipe's teacher, or the given student, writes itself."""
    source: str | None = None
    """Data source that the recipe imports (import); its options stand beside this key."""
    kind: Literal["text", "chat"] = "text"
    """text = documents; chat = rows of messages, or of prompt and completion and the like, formatted with the tokenizer's chat template."""
    mask_prompts: bool = True
    """chat: train only on the messages of the assistant."""
    text_field: str = "text"
    """Column or JSON key that holds the text (jsonl, json, csv, parquet, hub)."""
    special_tokens: Literal["auto", "text", "control"] = "auto"
    """How the spelling of a control token in the data (``<|im_end|>``) is tokenized: text = as ordinary text; control = as the token;
    auto = as text in chats, as the token in documents."""
    max_documents: Count | None = None
    """Read at most this many documents. Default: all."""

    def _check_text(self, what: str) -> None:
        """Check the keys of this class; ``what`` names the section.

        Raises:
            ValueError: not exactly one source is given, or keys do not fit each other.
        """
        check_fields(self)
        # by truth: an empty list of files is no source either
        given = [name for name in self.exactly_one if getattr(self, name)]
        if len(given) != 1:
            *others, last = (f"'{name}'" for name in self.exactly_one)
            raise ValueError(f"{what} needs exactly one of {', '.join(others)} and {last}; given: {given or 'none'}")
        if self.source is not None and self.part is None:
            raise ValueError(
                f"source={self.source!r} is no data source that the recipe imports; name the file that registers it (import: FILE.py)"
            )
        if self.kind == "chat" and self.builtin:
            raise ValueError("kind=chat needs rows of conversations, and builtin text has none; give 'files' or 'hub'")
        if self.kind == "chat" and self.generate and self.generate.start == "text":
            raise ValueError("kind=chat needs conversations, and generate.start is 'text'; leave one of the two out")
        if self.generate and self.max_documents is not None:
            raise ValueError(f"max_documents={self.max_documents} is not used with generate, whose size is generate.tokens; leave it out")
        if self.hub_shards and (not self.hub or self.max_documents is not None):
            other = (
                "max_documents, which reads only the first rows anyway" if self.hub else "the other sources, which are read in parts anyway"
            )
            raise ValueError(f"hub_shards=true is for a whole dataset of the hub and has no effect on {other}; leave one of the two out")
        if self.kind == "text" and not self.mask_prompts:
            raise ValueError("mask_prompts=false has no effect with kind=text, which has no prompts; set kind: chat, or leave it out")


@dataclass(frozen=True, kw_only=True)
class BlendPart(TextSettings):
    """A part of a blend: exactly one of ``builtin``, ``files``, ``hub``, ``generate`` and ``source``, with ``weight`` or ``tokens``."""

    whole: ClassVar[Any] = None
    """The settings of the same imported source as the text of a whole run; None without one."""

    name: str | None = None
    """Name in metrics, plan and report (letters, digits, '_' and '-'). Default: made of the source."""
    weight: Annotated[float, Bounds(gt=0, le=1e9, why="a part without weight is left out of the list")] | None = None
    """Share of the training tokens; the weights of all parts together are the whole, so they need not add up to 1."""
    tokens: Count | None = None
    """In place of weight, in all parts: the tokens that a stage of the sum of all these tokens reads of this part; a stage of another
    length reads them in the same proportion."""
    eval_tokens: Annotated[int, Bounds(ge=2)] | None = None
    """Tokens of this part that are held out. Default: data.eval_tokens, so that weights may change and the same text stays held out; of
    these, the part's share of data.eval_tokens is measured. Lower it where a part is short."""

    def __post_init__(self) -> None:
        self._check_text("a part of a blend")
        if (self.weight is None) == (self.tokens is None):
            raise ValueError("a part of a blend needs 'weight' (a share, such as 0.3) or 'tokens' (such as 10M), and not both")
        if self.name is not None and not PART_NAME.fullmatch(self.name):
            raise ValueError(f"name={self.name!r} cannot name a part; use at most 40 letters, digits, '_' and '-'")
        if self.hub_config and not self.hub:
            raise ValueError("hub_config= configures a hub dataset, and hub is not given; remove it, or give hub")

    @property
    def label(self) -> str:
        """``name``, or a name that is made of the source."""
        if self.name:
            return self.name
        if self.files:
            # a glob such as math/*.jsonl is named by its folder
            named = [piece for piece in PurePath(self.files[0]).parts if not set(piece) & set("*?[")]
            found = PurePath(named[-1]).name.partition(".")[0] if named else "files"
        elif self.hub:
            found = self.hub.rstrip("/").rpartition("/")[2]
        else:
            found = self.builtin or self.source or "generated"
        clean = re.sub("[^A-Za-z0-9_-]+", "-", found).strip("-_")[:40]
        return clean or "part"


def token_shares(parts: "tuple[BlendPart, ...]") -> "list[Fraction]":
    """Share of the training tokens that each part has; they add up to 1. Numbers count as they are written: 0.3 is three tenths."""
    exact = [Fraction(repr(part.weight)) if part.weight is not None else Fraction(part.tokens or 0) for part in parts]
    return [share / sum(exact) for share in exact]


def labels_of(parts: "tuple[BlendPart, ...]") -> list[str]:
    """The names of all parts; of equal ones that are made of a source, the later ones get a number."""
    taken = {part.name for part in parts if part.name}
    found: list[str] = []
    for part in parts:
        label, number = part.label, 1
        while part.name is None and (label in taken or label in found):
            number += 1
            label = f"{part.label}-{number}"
        found.append(label)
    return found
