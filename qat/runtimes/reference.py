"""What a runtime is compared with: the logits of the model that the independent reader rebuilds of an export."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.common.errors import UserError
from ...models.common.host_memory import available_bytes
from ...models.folder.structure import model_structure, plain_config
from ..readers.compressed_tensors import PackedFolder
from ..readers.open import open_export
from ..rebuild import load_exported_model
from ..rebuild_inputs import Arithmetic
from .outcome import outcome

_SEQUENCES, _POSITIONS = 4, 32
_BYTES = 5
"""Memory per parameter while a model is rebuilt in fp32: itself, and a part of it once more."""


class Reference:
    """The rebuilt model along a text. It is rebuilt when a runtime has answered, and once for all of them.

    Args:
        path: An export: a folder, or a GGUF file with config.json in its folder.
        tokens: int64 [B, S] of real text; None takes 128 pseudo-random tokens.
        context: Longest row that the runtime takes; rows are cut to it.
    """

    def __init__(self, path: Path, tokens: Tensor | None, context: int | None = None) -> None:
        self.path = Path(path)
        self.folder = self.path.parent if self.path.is_file() else self.path
        self.real_text = tokens is not None
        self._given, self._context = tokens, context
        self._made: tuple[Arithmetic, Tensor] | None = None

    @property
    def tokens(self) -> Tensor:
        """int64 [B, S]; UserError when the given ones do not fit the model's vocabulary."""
        return chosen_tokens(self.folder, self._given)[:, : self._context]

    def too_large(self) -> dict[str, Any] | None:
        """The outcome 'skipped' where there is too little memory to rebuild the model; None where there is enough, or nobody knows."""
        needed, free = _BYTES * model_structure(self.folder).parameters, available_bytes()
        if free is None or needed <= free:
            return None
        return outcome("skipped", reason=f"rebuilding in fp32 needs about {needed:,} bytes of memory, {free:,} are free")

    def logits(self, arithmetic: Arithmetic = "kernels") -> Tensor:
        """fp32 [B, S, V]; ``arithmetic`` says how inputs are rounded where the export says that they are.

        Raises:
            UserError: the export cannot be rebuilt.
        """
        if not _rounds_inputs(self.path):
            arithmetic = "kernels"
        if self._made is None or self._made[0] != arithmetic:
            model = load_exported_model(self.path, inputs=arithmetic)
            with torch.inference_mode():
                logits = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in self.tokens])
            self._made = arithmetic, logits
        return self._made[1]


def chosen_tokens(folder: Path, tokens: Tensor | None) -> Tensor:
    """``tokens`` when they fit the model, pseudo-random ones when there are none; UserError when they do not."""
    config = plain_config(folder).get_text_config()
    vocabulary = int(config.vocab_size)
    if tokens is None:
        length = min(_POSITIONS, int(getattr(config, "max_position_embeddings", None) or _POSITIONS))
        return torch.randint(0, vocabulary, (_SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or not tokens.numel():
        raise UserError(f"tokens must be int64 [B, S], not {tokens.dtype} of shape {tuple(tokens.shape)}")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise UserError(f"tokens span {int(tokens.min())}..{int(tokens.max())}, but {folder} has a vocabulary of {vocabulary}")
    return tokens


def _rounds_inputs(path: Path) -> bool:
    opened = open_export(path)
    return isinstance(opened, PackedFolder) and any(group.inputs is not None for group in opened.scheme.groups)
