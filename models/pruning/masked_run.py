"""One pass of text through a backbone, with hooks that see the unmasked tokens alone."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..batches import backbone_inputs
from ..eval_mode import eval_mode
from ..families import backbone_and_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MaskedRun:
    """The mask of the batch that is being read."""

    def __init__(self) -> None:
        self._mask: Tensor = torch.empty(0)

    def rows(self, values: Tensor) -> Tensor:
        """The unmasked tokens of [B, S, C] or [B * S, C] as [tokens, C]."""
        return values.detach().reshape(*self._mask.shape, -1)[self._mask]

    @torch.no_grad()
    def read(self, model: "PreTrainedModel", text: Sequence[Mapping[str, Tensor]], hooks: ExitStack) -> None:
        """Runs the text through the backbone in eval mode, and takes the hooks off."""
        backbone, _, _ = backbone_and_head(model)
        with hooks, eval_mode(model):
            for batch in text:
                self._mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).to(model.device).bool()
                backbone(**backbone_inputs(batch, model.device))
