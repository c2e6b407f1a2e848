"""Rotations of the residual stream (R1) and of each head between values and attention output (R2), folded into the weights.

An RMSNorm without a gain commutes with an orthogonal matrix. So the gains go into the matrices behind them first; then every matrix that
writes into the residual stream is rotated along its outputs and every one that reads it along its inputs. Values are averaged by attention
without mixing the channels of a head, so that a rotation of a head is undone in the columns that read it.

Sources: Ashkboos et al. (QuaRot), arXiv 2404.00456; Liu et al. (SpinQuant), arXiv 2405.16406, figure 1 for the names.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...models.calibration.replay import Replay
from ...models.sizes import sizes_of
from ...models.ties import is_tied, untie
from .folding import dimensions
from .hadamard import Rotation
from .layer_case import TransformCase


class Rotated:
    """Random Hadamard rotations; each layer has a matrix of its own for its heads."""

    def __init__(self, case: TransformCase) -> None:
        self._case = case
        self._sizes = sizes_of(case.model.config, case.family)
        self._residual = Rotation(self._sizes.hidden, case.seed, "residual") if case.settings.residual else None
        self._untied = False

    @torch.no_grad()
    def outside(self) -> None:
        if self._residual is None:
            return
        model, family = self._case.model, self._case.family
        # the head takes the gain of the final norm, the embedding does not
        self._untied = is_tied(model)
        untie(model)
        embedding: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        self._take_gain(model.get_submodule(family.final_norm), [(head.weight, 1)])
        for table in (embedding, head):
            table.weight.copy_(self._residual.rotated(table.weight))

    @torch.no_grad()
    def layer(self, index: int, layer: nn.Module, replay: Replay | None, advance: Callable[[int], None]) -> None:
        if self._residual is not None:
            self._rotate_residual(layer)
        if self._case.settings.heads:
            self._rotate_heads(layer, Rotation(self._sizes.head_dim, self._case.seed, f"heads of layer {index}"))

    def record(self) -> dict[str, Any]:
        """The seed and the matrices."""
        found: dict[str, Any] = {"method": "rotation", "seed": self._case.seed}
        if self._residual is not None:
            found["residual"] = {"size": self._residual.size, "hadamard": self._residual.order.words()}
            found["untied"] = self._untied
        if self._case.settings.heads:
            heads = Rotation(self._sizes.head_dim, self._case.seed, "")
            found["heads"] = {"size": heads.size, "hadamard": heads.order.words()}
        return found

    def _take_gain(self, norm: Any, readers: Sequence[tuple[Tensor, int]]) -> None:
        """Multiplies the inputs of the readers, (weight, dimension of the inputs), by the norm's gain, which becomes 1."""
        offset = self._case.family.norm_offset
        gain = norm.weight.to(torch.float64) + offset
        for weight, dim in readers:
            columns = weight if dim == 1 else weight.T
            columns.copy_(columns * gain)
        norm.weight.fill_(1 - offset)

    def _rotate_residual(self, layer: nn.Module) -> None:
        family, rotation = self._case.family, self._residual
        assert rotation is not None
        for place, readers in family.readers().items():
            found = [(layer.get_parameter(f"{name}.weight"), dimensions(family, name)[1]) for name in readers]
            self._take_gain(layer.get_submodule(family.norms_before[place]), found)
        # what has a dimension of hidden channels reads the stream there or writes into it; norms have become 1
        for name, entry in family.layer.items():
            module, _, kind = name.rpartition(".")
            if "hidden" not in entry or module not in family.matrices:
                continue
            parameter = getattr(layer.get_submodule(module), kind, None)
            if parameter is not None:
                parameter.copy_(rotation.rotated(parameter, entry.index("hidden")))

    def _rotate_heads(self, layer: nn.Module, rotation: Rotation) -> None:
        family, rows = self._case.family, self._sizes.kv_heads * self._sizes.head_dim
        values: Any = layer.get_submodule(family.value)
        dim = dimensions(family, family.value)[0]
        # of a fused matrix the last part
        part = values.weight.movedim(dim, 0)[-rows:]
        part.copy_(_by_heads(part.T, rotation).T)
        if values.bias is not None:
            values.bias[-rows:] = _by_heads(values.bias[-rows:], rotation)
        out = layer.get_parameter(f"{family.attention_out}.weight")
        columns = out if dimensions(family, family.attention_out)[1] == 1 else out.T
        columns.copy_(_by_heads(columns, rotation))


def _by_heads(tensor: Tensor, rotation: Rotation) -> Tensor:
    """The last dimension rotated head by head."""
    return rotation.rotated(tensor.reshape(*tensor.shape[:-1], -1, rotation.size)).reshape(tensor.shape)
