"""What a user may choose about teacher and student (plain data; the work is done in ``teachers/`` and ``student.py``)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

LoadIn = Literal["fp32", "bf16", "int8", "nf4"]
Placement = Literal["replicated", "sharded", "offloaded"]
CacheMode = Literal["top_k", "sampled", "hybrid"]

NF4_BLOCK = 64
"""Weights of an nf4 teacher that share an fp32 scale."""

CACHED_BYTES: Mapping[CacheMode, int] = {"top_k": 120, "sampled": 39, "hybrid": 97}
"""Bytes that a cache takes of each position at most, where the user names no number of tokens."""
MOST_TOKENS = 1024
"""Tokens that a cache may keep of each position."""
MOST_TOP_K = 50
"""Tokens that a top-k cache keeps at most, where the user names no number."""


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
class CacheSettings:
    """What is kept of a teacher's predictions, so that it runs over the text once and not once a stage and epoch."""

    mode: CacheMode = "hybrid"
    """top_k = the likeliest tokens, the mass of the others as one number; sampled = the likeliest token and a sample of the others,
    unbiased; hybrid = a quarter likeliest tokens, three quarters sample, unbiased."""
    tokens: int | None = None
    """Tokens kept of each position; default: as many as 39 bytes (sampled) or 97 bytes (hybrid) hold, which is 12 and 32 at a vocabulary of
    128,256 and more at a smaller one; 50 (top_k)."""
    path: str | None = None
    """Folder of the cache; default: by content, in the cache folder (environment variable DECOCT_CACHE)."""

    def __post_init__(self) -> None:
        if self.tokens is not None and not 2 <= self.tokens <= MOST_TOKENS:
            raise ValueError(f"tokens={self.tokens} must lie in 2..{MOST_TOKENS}: how many tokens are kept of each position")


@dataclass(frozen=True, kw_only=True)
class ServedSettings:
    """A server that predicts in the teacher's place: OpenAI-compatible, with vLLM's ``prompt_logprobs``."""

    url: str
    """Address up to and including the version, such as http://host:8000/v1; it holds no key and no password."""
    model: str
    """Name of the model on the server."""
    tokens: int = 20
    """Likeliest tokens asked for at each position; vLLM allows 20 unless started with --max-logprobs."""
    requests: int = 8
    """Requests under way at once, each in a thread; at most 256."""
    timeout: float = 120.0
    """Seconds to wait for a whole answer."""
    retries: int = 5
    """Further tries after a time-out, a broken-off answer or an overloaded server, with growing pauses."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, if the server wants one."""

    def __post_init__(self) -> None:
        _check_url(self.url, self.key_variable)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            # what it holds is not shown: it may be the key itself
            raise ValueError("key_variable= names the environment variable that holds the key (letters, digits, '_'), not the key itself")
        for name, most in (("tokens", 1_000_000), ("requests", 256), ("timeout", 86_400)):
            if not 0 < getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0 and at most {most:,}")
        if not 0 <= self.retries <= 1000:
            raise ValueError(f"retries={self.retries} must lie in 0..1000")


def _check_url(url: str, key_variable: str) -> None:
    """A plain address; a password or a key in it, which would be printed, logged and written, is refused without being shown."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        known, parts = False, urlsplit("")
    if "@" in url or parts.query or parts.fragment:
        raise ValueError(
            "url= holds a name, password or query; addresses are printed and written into files, so put the key into the environment "
            f"variable {key_variable} (teacher.served.key_variable) and give the bare address, such as http://host:8000/v1"
        )
    if not known or not url.isprintable() or " " in url:
        raise ValueError(f"url={url!r} must begin with http:// or https:// and name a host, such as http://host:8000/v1")


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
    cache: CacheSettings | None = None
    """Let the teacher predict the training text once, keep a part of it on disk and train from that (forward KL)."""
    served: ServedSettings | None = None
    """Let a server predict while training (forward KL); ``path`` still names the same model, for tokenizer and measurements."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.scratch is None):
            raise ValueError("a teacher needs exactly one of 'path' (model folder or hub id) and 'scratch'")
        if self.served and self.scratch:
            raise ValueError("a served teacher is named by 'path' (the model that the server runs), not by 'scratch'")
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
