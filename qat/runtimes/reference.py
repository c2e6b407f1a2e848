"""Reference for runtimes: the logits of the model that the independent reader rebuilds from an export."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.common.errors import UserError
from ...models.common.host_memory import available_bytes
from ...models.folder.structure import model_structure, plain_config
from ..readers.bitsandbytes import BitsandbytesFolder
from ..readers.compressed_tensors import PackedFolder
from ..readers.open import open_export
from ..rebuild import load_exported_model
from ..rebuild_inputs import Arithmetic
from .outcome import outcome

_SEQUENCES, _POSITIONS = 4, 32
_BYTES = 5
"""Bytes per parameter while a model is rebuilt in fp32: 4 for the model, and 1 for the part that exists twice."""


class Reference:
    """Logits of the rebuilt model along a text, computed on first use and shared by all runtimes.

    Args:
        path: An export: a folder, or a GGUF file with config.json in its folder.
        tokens: int64 [B, S], real text; None takes 128 pseudo-random tokens.
        context: Longest row that the runtime accepts; rows are cut to it.
    """

    def __init__(self, path: Path, tokens: Tensor | None, context: int | None = None) -> None:
        self.path = Path(path)
        self.folder = self.path.parent if self.path.is_file() else self.path
        self.real_text = tokens is not None
        self._given, self._context = tokens, context
        self._made: tuple[Arithmetic, Tensor] | None = None

    @property
    def positions(self) -> int | None:
        """Return the length of the model's context; None if it has no limit."""
        return _positions(plain_config(self.folder).get_text_config())

    @property
    def tokens(self) -> Tensor:
        """Return the tokens, int64 [B, S]; UserError if the given ones do not fit the model's vocabulary."""
        tokens = chosen_tokens(self.folder, self._given)
        # behind its context a model predicts nothing, or has no position at all
        return tokens[:, : min(filter(None, (self._context, self.positions)), default=None)]

    def too_large(self) -> dict[str, Any] | None:
        """Return the outcome 'skipped' if memory is too small to rebuild the model; None if it suffices or is unknown."""
        needed, free = _BYTES * model_structure(self.folder).parameters, available_bytes()
        # better skipped than killed by the system when memory runs out
        if free is None or needed <= free:
            return None
        return outcome("skipped", reason=f"rebuilding in fp32 needs about {needed:,} bytes of memory, {free:,} are free")

    def logits(self, arithmetic: Arithmetic = "kernels") -> Tensor:
        """Return the logits, fp32 [B, S, V]; ``arithmetic`` selects how inputs are rounded, if the export rounds them.

        Raises:
            UserError: the export cannot be rebuilt.
        """
        if not _rounds_inputs(self.path):
            # both arithmetics are equal without rounded inputs: do not rebuild the model twice
            arithmetic = "kernels"
        if self._made is None or self._made[0] != arithmetic:
            model = load_exported_model(self.path, inputs=arithmetic)
            with torch.inference_mode():
                # row by row, as the judges predict: memory holds the activations of one row
                logits = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in self.tokens])
            # kept, because several runtimes are compared with the same logits; the model is freed
            self._made = arithmetic, logits
        return self._made[1]


def chosen_tokens(folder: Path, tokens: Tensor | None) -> Tensor:
    """Return ``tokens``, or pseudo-random ones for None; UserError if they do not fit the model's vocabulary."""
    config = plain_config(folder).get_text_config()
    vocabulary = int(config.vocab_size)
    if tokens is None:
        length = min(_POSITIONS, _positions(config) or _POSITIONS)
        # a fixed seed: the same export is always asked about the same tokens
        return torch.randint(0, vocabulary, (_SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or not tokens.numel():
        raise UserError(f"tokens must be int64 [B, S], not {tokens.dtype} of shape {tuple(tokens.shape)}")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise UserError(f"tokens span {int(tokens.min())}..{int(tokens.max())}, but {folder} has a vocabulary of {vocabulary}")
    return tokens


def _positions(config: Any) -> int | None:
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if found else None


def _rounds_inputs(path: Path) -> bool:
    opened = open_export(path)
    if isinstance(opened, BitsandbytesFolder):
        return not opened.nf4
    return isinstance(opened, PackedFolder) and any(group.inputs is not None for group in opened.scheme.groups)
