"""What a user may choose about teacher and student (plain data; the work is done in ``teachers/`` and ``student.py``)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from .. import Bounds, Count, check_fields

LoadIn = Literal["fp32", "bf16", "int8", "nf4"]
Placement = Literal["replicated", "sharded", "offloaded"]
CacheMode = Literal["top_k", "sampled", "hybrid", "hidden"]
StoredStates = Literal["bf16", "fp32", "int8"]

NF4_BLOCK = 64
"""Weights of an nf4 teacher that share an fp32 scale."""

CACHED_BYTES: Mapping[CacheMode, int] = {"top_k": 120, "sampled": 39, "hybrid": 97}
"""Largest number of bytes per position of a cache, if the user sets no number of tokens."""
MOST_TOKENS = 1024
"""Largest number of tokens that a cache can keep per position."""
MOST_TOP_K = 50
"""Largest number of tokens that a top-k cache keeps per position, if the user sets none."""


@dataclass(frozen=True, kw_only=True)
class ScratchSettings:
    """A small Llama teacher with its own byte-level BPE tokenizer. It is trained on the recipe's text, and cached."""

    hidden: Count = 192
    """Hidden size (channels)."""
    layers: Count = 6
    """Decoder layers."""
    heads: Count = 3
    """Query heads; must divide ``hidden``."""
    kv_heads: Count = 1
    """Key/value heads; must divide ``heads``."""
    ffn: Count = 512
    """Intermediate channels of the gated FFN."""
    vocab: Annotated[int, Bounds(ge=257, why="for 256 bytes and the end-of-text token")] = 2048
    """Tokens of the tokenizer, special tokens included."""
    tokens: Count = 1_000_000
    """Training tokens."""
    learning_rate: Annotated[float, Bounds(gt=0)] = 2e-3
    """Peak learning rate (AdamW, warm-up, cosine decay)."""
    tie_embeddings: bool = True
    """Share the embedding table with the output head."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """The part of a teacher's predictions that is kept on disk, so that the teacher reads the training text once and not in every stage.

    ``cache: top_k`` is short for ``cache: {mode: top_k}``.
    """

    mode: CacheMode = "hybrid"
    """What is kept per position: top_k = the likeliest tokens, with the mass of all others as one number; sampled = the likeliest token and
    an unbiased sample of the others; hybrid = one quarter likeliest tokens, three quarters sample, unbiased; hidden = the last hidden
    state, and once the output head, from which every divergence follows."""
    tokens: Annotated[int, Bounds(ge=2, le=MOST_TOKENS, why="it is the number of tokens kept per position")] | None = None
    """Tokens kept per position. Default: as many as fit into 39 bytes (sampled) or 97 bytes (hybrid), which is 12 and 32 at a vocabulary of
    128,256 and more at a smaller one; 50 for top_k. Not for hidden."""
    states: StoredStates | None = None
    """hidden: how states are stored, in 2, 4 or about 1 byte per channel. bf16 is exact for a teacher that computes in bf16, fp32 for
    every one. Default: bf16."""
    path: str | None = None
    """Folder of the cache. Default: a folder named by content, in the cache folder (environment variable DECOCT_CACHE)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.mode == "hidden":
            if self.tokens is not None:
                raise ValueError(
                    f"tokens={self.tokens} has no effect: mode hidden keeps the state that all tokens follow from; leave it out"
                )
            if self.states is None:
                object.__setattr__(self, "states", "bf16")
        elif self.states is not None:
            raise ValueError(f"states={self.states} has no effect: it belongs to mode hidden, and mode is {self.mode}; leave it out")

    @property
    def whole(self) -> bool:
        """Whether the whole distribution follows from what is kept, so that any divergence can be computed."""
        return self.mode == "hidden"


@dataclass(frozen=True, kw_only=True)
class ServedSettings:
    """An OpenAI-compatible server that predicts in the teacher's place; it must support vLLM's ``prompt_logprobs``."""

    url: str
    """Address up to and including the version, such as http://host:8000/v1. It holds no key and no password."""
    model: str
    """Name of the model on the server."""
    tokens: Annotated[int, Bounds(ge=1, le=1_000_000)] = 20
    """Likeliest tokens requested per position. vLLM allows 20 unless it is started with --max-logprobs."""
    requests: Annotated[int, Bounds(ge=1, le=256)] = 8
    """Concurrent requests, one thread each."""
    timeout: Annotated[float, Bounds(gt=0, le=86_400)] = 120.0
    """Seconds to wait for a complete answer."""
    retries: Annotated[int, Bounds(ge=0, le=1000)] = 5
    """Retries after a time-out, an incomplete answer or an overloaded server, with growing pauses."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, if the server needs one."""

    def __post_init__(self) -> None:
        check_fields(self)
        _check_url(self.url, self.key_variable)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            # the value is not shown: it may be the key itself
            raise ValueError("key_variable= names the environment variable that holds the key (letters, digits, '_'), not the key itself")


def _check_url(url: str, key_variable: str) -> None:
    """ValueError unless ``url`` is a plain address. A password or key in it is never shown: messages are printed and logged."""
    try:
        parts = urlsplit(url)
        # port 0 and ports beyond 65,535 are no addresses; urlsplit raises for the latter
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        # an address that cannot be parsed has no query and no fragment
        known, parts = False, urlsplit("")
    # checked first, so that the address with a password is in no message
    if "@" in url or parts.query or parts.fragment:
        raise ValueError(
            "url= holds a name, password or query; addresses are printed and written into files, so put the key into the environment "
            f"variable {key_variable} (teacher.served.key_variable) and give the bare address, such as http://host:8000/v1"
        )
    if not known or not url.isprintable() or " " in url:
        raise ValueError(f"url={url!r} must begin with http:// or https:// and name a host, such as http://host:8000/v1")


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """The teacher: exactly one of ``path`` and ``scratch``."""

    exactly_one: ClassVar = ("path", "scratch")

    path: str | None = None
    """Model folder, .gguf file or hub id."""
    adapter: str | None = None
    """Folder of a LoRA adapter of peft that is merged into ``path``: in fp32, rounded once to its dtype, as ``decoct import`` does."""
    scratch: ScratchSettings | None = None
    """Train a small teacher on the recipe's own text (no download)."""
    load_in: LoadIn = "bf16"
    """Precision of the teacher's weights in memory: fp32, bf16, or linear layers quantized by bitsandbytes to int8 or nf4. Logits are
    always fp32."""
    placement: Placement = "replicated"
    """replicated = whole on every device; sharded = each process holds a share of every layer; offloaded = in host memory, one layer at a
    time on the device. int8 and nf4 must be replicated."""
    revision: str | None = None
    """Hub revision (commit, tag or branch)."""
    cache: CacheSettings | None = None
    """Let the teacher predict the training text once, keep part of the predictions on disk, and train from them (forward KL only, but any
    divergence with mode hidden)."""
    served: ServedSettings | None = None
    """Let a server predict during training (forward KL only). ``path`` still names the same model, for its tokenizer and measurements."""

    def __post_init__(self) -> None:
        check_fields(self)
        # equal = both or neither
        if (self.path is None) == (self.scratch is None):
            raise ValueError("a teacher needs exactly one of 'path' (model folder or hub id) and 'scratch'")
        if self.adapter and not self.path:
            raise ValueError("adapter= is merged into the model that 'path' names; a scratch teacher has none")
        # a scratch teacher is made by this run, so no server has it
        if self.served and self.scratch:
            raise ValueError("a served teacher is named by 'path' (the model that the server runs), not by 'scratch'")
        if self.load_in in ("int8", "nf4") and self.placement != "replicated":
            raise ValueError(f"placement={self.placement} needs load_in: bf16 or fp32; a teacher in {self.load_in} is always replicated")


def allowed_layers(depth: int) -> str:
    """What a message says of the layers that can be kept of a teacher with ``depth`` layers: 'give 2 to 24', or the only number."""
    # the first and the last layer are always kept
    return f"give 2 to {depth}" if depth > 2 else f"give {depth}, which keeps all"


@dataclass(frozen=True, kw_only=True)
class KeepSettings:
    """The part of the teacher that the student starts from."""

    layers: Count | tuple[Annotated[int, Bounds(ge=0, why="layers are counted from 0")], ...]
    """Decoder layers that are kept: a number, evenly spread and always with the first and the last; or a list of the layers themselves,
    counted from 0."""

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.layers, int):
            return
        if not self.layers:
            raise ValueError("layers=[] keeps no layer; give a number such as 12, or layers such as [0, 2, 5]")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(
                f"layers={list(self.layers)} is not in ascending order; give each layer once, in the teacher's order: "
                f"{sorted(set(self.layers))}"
            )

    @property
    def depth(self) -> int:
        """Number of layers that are kept."""
        return self.layers if isinstance(self.layers, int) else len(self.layers)


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """The student: exactly one of ``path``, ``keep`` (part of the teacher) and ``config`` (random weights)."""

    exactly_one: ClassVar = ("path", "keep", "config")

    path: str | None = None
    """Model folder, .gguf file or hub id."""
    adapter: str | None = None
    """Folder of a LoRA adapter of peft that is merged into ``path``: in fp32, rounded once to its dtype, as ``decoct import`` does."""
    keep: KeepSettings | None = None
    """Start from the teacher with fewer layers."""
    config: dict[str, Any] | None = None
    """transformers config of a student with random weights: ``model_type`` and its fields. The vocabulary comes from the tokenizer."""
    revision: str | None = None
    """Hub revision of ``path``."""

    def __post_init__(self) -> None:
        given = [name for name in self.exactly_one if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a student needs exactly one of 'keep', 'path' and 'config'; given: {given or 'none'}")
        if self.adapter and not self.path:
            raise ValueError(f"adapter= is merged into the model that 'path' names; this student is made by {given[0]!r}")
