"""Prunes a whole model in one shot, decoder layer by decoder layer; each is calibrated on the outputs of the pruned linears before it.

The sums over the calibration text do not depend on how it is cut into batches, up to the order of fp32 additions. Linears that share an
input share its moments and their factorization; masks are chosen in each matrix alone.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..calibration.calibration_text import CalibrationText
from ..calibration.error_report import KindError, linear_kind
from ..calibration.factor import Factor, factorize
from ..calibration.hessians import SharedInput
from ..calibration.layer_storage import MemoryShelf
from ..calibration.replay import Remedies, Replay
from ..calibration.running_order import calibrated_inputs
from ..common.errors import UserError
from ..families import decoder_layers, decoder_linears
from .magnitude import magnitude_masks
from .pattern import Pattern
from .selection import finite, magnitude_pattern_mask
from .sparsegpt import sparsegpt
from .wanda import wanda_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CalibratedMethod = Literal["wanda", "sparsegpt"]
_INSTEAD = "use prune.magnitude, which needs no calibration"
_REMEDIES = Remedies(linear=_INSTEAD, layer=_INSTEAD, overflow="Take an earlier checkpoint")


@dataclass(frozen=True, kw_only=True)
class OneShot:
    """How single weights are pruned on calibration text."""

    method: CalibratedMethod
    keep: float
    """Share of the weights that stays, (0, 1]; with a pattern, its share."""
    pattern: Pattern | None = None
    damping: float = 0.01
    """sparsegpt: share of the Hessian's mean diagonal that is added to its diagonal."""


@dataclass
class PrunedLayers:
    """Result of ``prune_layers``; the model itself has the zeros."""

    kept: dict[str, int] = field(default_factory=dict)
    """Weights that the mask of each linear keeps, in module order; what is tied counts with its first name."""
    errors: dict[str, KindError] = field(default_factory=dict)
    """Squared output errors by kind of linear, beside those of pruning by magnitude."""
    notes: list[str] = field(default_factory=list)
    """What differs from the settings, one sentence each."""


@torch.no_grad()
def prune_layers(
    model: "PreTrainedModel",
    how: OneShot,
    text: CalibrationText,
    *,
    sparse: Collection[str] = (),
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda tokens: None,
) -> PrunedLayers:
    """Prunes the linears of the decoder layers in place.

    Args:
        model: Plain, fp32, on the CPU.
        how: Method and share.
        text: Calibration text.
        sparse: Linears whose exact zeros are a mask already: these stay zero and count as pruned.
        device: Device of the work, one layer at a time.
        advance: Called with tokens that passed a layer; the total is ``amount_of_work``.

    Raises:
        UserError: there are no layers, linears or tokens; a pattern does not divide a linear's inputs; a linear does not run on the text,
            or all of its inputs are zero there; a Hessian has no Cholesky factor with any damping up to 1.
        NonFiniteError: weights or inputs are NaN or infinite.
    """
    layers, linears = decoder_layers(model), decoder_linears(model)
    _check(how, layers, linears, text)
    device = torch.device(device)
    shelf = MemoryShelf(model, layers, device)
    replay = Replay(model, layers, text.batches, device, _REMEDIES)
    work = _Pruning(how, frozenset(sparse), PrunedLayers(errors={linear_kind(name): KindError() for name in linears}))
    training = model.training
    # dropout would make calibration random
    model.eval()
    try:
        for index, layer in enumerate(layers):
            last, inside = index + 1 == len(layers), {id(module) for module in layer.modules()}
            own = {name: linear for name, linear in linears.items() if id(linear) in inside}
            shelf.bring(layer)
            if own:
                for shared in calibrated_inputs(replay, index, layer, own, whole=True, last=last, advance=advance):
                    work.prune(shared, {name: own[name] for name in shared.names})
            else:
                advance(text.tokens)
            if not last:
                replay.finish(index, advance)
            shelf.put_away(layer, {})
        shelf.close()
    finally:
        model.train(training)
    done = work.result
    done.kept = {name: done.kept[name] for name in linears if name in done.kept}
    return done


def amount_of_work(model: "PreTrainedModel", text: CalibrationText) -> int:
    """The total of all calls of ``advance``: tokens through layers, once for sums and once for the inputs of the next layer."""
    return text.tokens * max(0, 2 * len(decoder_layers(model)) - 1)


def _check(how: OneShot, layers: Sequence[nn.Module], linears: Mapping[str, nn.Linear], text: CalibrationText) -> None:
    """Everything that can be refused before the first weight is changed."""
    if not text.tokens:
        raise UserError(f"{how.method} needs calibration text, and there is none; raise calibration_tokens or give more text")
    if not layers:
        raise UserError(f"{how.method} works on decoder layers, and the model's are not found; {_INSTEAD}")
    if not linears:
        raise UserError(f"{how.method} prunes linears of the decoder layers, and this model has none there; use a model of another family")
    if how.pattern is not None:
        how.pattern.check_widths({name: linear.in_features for name, linear in linears.items()})
    for name, linear in linears.items():
        finite(name, linear.weight)


@dataclass
class _Pruning:
    """The work on the inputs of a layer."""

    how: OneShot
    sparse: frozenset[str]
    result: PrunedLayers
    _seen: set[int] = field(default_factory=set)

    def prune(self, shared: SharedInput, linears: Mapping[str, nn.Linear]) -> None:
        """Prunes the linears that read one input."""
        hessian = shared.moments
        if not bool(hessian.diagonal().any()):
            raise UserError(
                f"the inputs of {shared.names[0]} are all zero on the calibration text, so that nothing tells its weights apart; "
                f"remove the layer if it is dead, give other text, or {_INSTEAD}"
            )
        factor = self._factor(shared) if self.how.method == "sparsegpt" else None
        for name, linear in linears.items():
            # a tensor of two layers is pruned once, on the inputs of the first
            if id(linear.weight) in self._seen:
                continue
            self._seen.add(id(linear.weight))
            weight = linear.weight.detach().float()
            allowed = weight != 0 if name in self.sparse else None
            if factor is None:
                mask = wanda_mask(name, weight, hessian, self.how.keep, self.how.pattern, allowed)
                pruned = weight * mask
            else:
                pruned, mask = sparsegpt(name, weight, hessian, factor, self.how.keep, self.how.pattern, allowed)
            self.result.kept[name] = int(mask.sum())
            self.result.errors[linear_kind(name)].add(weight, pruned, weight * self._by_magnitude(name, weight, allowed), hessian)
            linear.weight.copy_(pruned)

    def _by_magnitude(self, name: str, weight: Tensor, allowed: Tensor | None) -> Tensor:
        """The mask of the report's baseline: as many weights of the same matrix, by magnitude."""
        if self.how.pattern is not None:
            return magnitude_pattern_mask(name, weight, self.how.pattern, allowed)
        return magnitude_masks({name: weight}, self.how.keep, "layer", None if allowed is None else {name: allowed})[name]

    def _factor(self, shared: SharedInput) -> Factor:
        # from left to right, so that a group of a pattern is decided as a whole
        factor = factorize(shared.moments, self.how.damping, activation_order=False)
        names = ", ".join(shared.names)
        if factor is None:
            raise UserError(
                f"sparsegpt: the Hessian of {names} has no Cholesky factor with any damping up to 1; give more calibration text, or use "
                "prune.wanda"
            )
        if factor.damping != self.how.damping:
            self.result.notes.append(
                f"{names}: damping raised to {factor.damping:g}: their Hessian has no Cholesky factor with {self.how.damping:g}"
            )
        return factor
