"""What a user may choose about teacher and student (plain data; the work is done in ``teachers/`` and ``student.py``)."""

from dataclasses import dataclass
from typing import Any, Literal

LoadIn = Literal["fp32", "bf16", "int8", "nf4"]
Placement = Literal["replicated", "sharded", "offloaded"]


@dataclass(frozen=True, kw_only=True)
class ScratchSettings:
    """A small Llama teacher, with its own byte-level BPE tokenizer, trained on the recipe's text and cached."""

    hidden: int = 192
    """Hidden size (channels)."""
    layers: int = 6
    """Decoder layers."""
    heads: int = 3
    """Query heads; head_dim = hidden / heads."""
    kv_heads: int = 1
    """Key/value heads; divides ``heads``."""
    ffn: int = 512
    """Intermediate channels of the gated FFN."""
    vocab: int = 2048
    """Tokenizer size, special tokens included."""
    tokens: int = 1_000_000
    """Training tokens."""
    learning_rate: float = 2e-3
    """Peak learning rate (AdamW, warm-up + cosine)."""
    tie_embeddings: bool = True
    """Share the embedding table with the head."""


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Where the teacher comes from: exactly one of ``path`` and ``scratch``."""

    path: str | None = None
    """Model folder or hub id."""
    scratch: ScratchSettings | None = None
    """Train a small teacher on the recipe's own text (no download)."""
    load_in: LoadIn = "bf16"
    """How its weights are held: fp32, bf16, or the linear layers rounded by bitsandbytes to int8 or nf4. Logits are always fp32."""
    placement: Placement = "replicated"
    """replicated = whole on every device; sharded = each process holds a share of every layer; offloaded = in host memory, one layer at a
    time on the device. int8 and nf4 are replicated."""
    revision: str | None = None
    """Hub revision (commit, tag or branch)."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.scratch is None):
            raise ValueError("a teacher needs exactly one of 'path' (model folder or hub id) and 'scratch'")
        if self.load_in in ("int8", "nf4") and self.placement != "replicated":
            raise ValueError(f"placement={self.placement} goes with load_in: bf16 or fp32; a teacher in {self.load_in} is replicated")


@dataclass(frozen=True, kw_only=True)
class KeepSettings:
    """Which part of the teacher the student starts from."""

    layers: int
    """Decoder layers kept: evenly spread, first and last always among them."""


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """Where the student starts: exactly one of ``keep`` (cut from the teacher), ``path`` and ``config`` (random weights)."""

    path: str | None = None
    """Model folder or hub id."""
    keep: KeepSettings | None = None
    """Start from the teacher with fewer layers."""
    config: dict[str, Any] | None = None
    """transformers config of a student with random weights (``model_type`` and its fields; vocabulary from the tokenizer)."""
    revision: str | None = None
    """Hub revision of ``path``."""

    def __post_init__(self) -> None:
        given = [name for name in ("path", "keep", "config") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a student needs exactly one of 'keep', 'path' and 'config'; given: {given or 'none'}")
