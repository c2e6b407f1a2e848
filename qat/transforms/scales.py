"""AWQ and SmoothQuant: scales of input channels, folded into the norm or the linear that makes them.

Both take scales = inputs^alpha / weights^(1 - alpha), of magnitudes of a channel's inputs and weights. So a channel that is made larger
by a factor, with weights smaller by it, gets that factor back, whatever alpha is.

Sources: Lin et al. (AWQ), arXiv 2306.00978, section 3.2, and its code for the weights' share and the grid; Xiao et al. (SmoothQuant),
arXiv 2211.10438, section 4. Here a channel's magnitude in AWQ is the root of the mean square, which is known from the second moments, and
the searched error is that of the linears' outputs, tr(D H D^T) with D = Q(W s) / s - W and H the second moments, not that of a block.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...models.calibration.hessians import shared_inputs
from ...models.calibration.maxima import channel_maxima
from ...models.calibration.replay import Replay
from ...models.couplings import Coupling, couplings
from ..fake_quant import decode, encode
from .clipping import clip, is_clipped
from .folding import by_channel, channels, dimensions, fold_scales, per_reader
from .layer_case import TransformCase
from .limits import ALPHAS


@dataclass
class _Told:
    """What was found for one coupling in all layers."""

    alphas: list[float | None] = field(default_factory=list)
    """None: no scales were better than any."""
    smallest: float = float("inf")
    largest: float = 0.0
    before: float = 0.0
    after: float = 0.0


class _Scaled(ABC):
    """A transform that scales the couplings of each layer."""

    def __init__(self, case: TransformCase) -> None:
        self.case = case
        self._couplings = couplings(case.model.config)
        self._told: dict[str, _Told] = {}

    def outside(self) -> None:
        """Nothing: no coupling reaches out of a layer."""
        return

    def layer(self, index: int, layer: nn.Module, replay: Replay | None, advance: Callable[[int], None]) -> None:
        assert replay is not None, "scales of channels need calibration text"
        # by coupling the one reader whose inputs are watched: the others read the same
        watched = {one: next(iter(names)) for one in self._couplings if (names := self.case.rounded(index, one.readers))}
        found = self._look(replay, index, {name: self.case.model.get_submodule(name) for name in watched.values()}, advance)
        for coupling, name in watched.items():
            self._scale(index, layer, coupling, found[name])

    def record(self) -> dict[str, Any]:
        """Method, options, and by coupling the mean alpha, the range of the scales, and for AWQ the errors."""
        scaled = {}
        for producer, told in self._told.items():
            used = [alpha for alpha in told.alphas if alpha is not None]
            scaled[producer] = {
                "layers": len(told.alphas),
                "alpha": sum(used) / len(used) if used else None,
                "scales": [told.smallest, told.largest],
                **({"error": told.after / told.before} if told.before else {}),
            }
        return {**self._options(), "scaled": scaled}

    @abstractmethod
    def _options(self) -> dict[str, Any]: ...

    @abstractmethod
    def _look(self, replay: Replay, index: int, linears: dict[str, Any], advance: Callable[[int], None]) -> dict[str, Tensor]: ...

    @abstractmethod
    def _scale(self, index: int, layer: nn.Module, coupling: Coupling, inputs: Tensor) -> None: ...

    def _fold(self, layer: nn.Module, coupling: Coupling, scales: Tensor, alpha: float | None) -> Tensor:
        used = fold_scales(layer, self.case.family, coupling, scales)
        told = self._told.setdefault(coupling.producer, _Told())
        told.alphas.append(alpha)
        told.smallest, told.largest = min(told.smallest, float(used.min())), max(told.largest, float(used.max()))
        return used

    def _weights(self, layer: nn.Module, coupling: Coupling) -> list[Tensor]:
        """The readers' weights [out, in]."""
        found = []
        for reader in coupling.readers:
            weight = layer.get_parameter(f"{reader}.weight").detach()
            found.append(weight if dimensions(self.case.family, reader)[1] == 1 else weight.T)
        return found


class SmoothQuant(_Scaled):
    """max|x|^alpha / max|w|^(1 - alpha)."""

    def _options(self) -> dict[str, Any]:
        return {"method": "smoothquant", "alpha": self.case.settings.alpha}

    def _look(self, replay: Replay, index: int, linears: dict[str, Any], advance: Callable[[int], None]) -> dict[str, Tensor]:
        return channel_maxima(replay, index, linears, advance)

    def _scale(self, index: int, layer: nn.Module, coupling: Coupling, inputs: Tensor) -> None:
        alpha = self.case.settings.alpha
        assert alpha is not None
        largest = torch.stack([weight.abs().amax(0) for weight in self._weights(layer, coupling)]).amax(0)
        scales = smoothing(by_channel(inputs, coupling).amax(1), by_channel(largest, coupling).amax(1), alpha)
        self._fold(layer, coupling, scales, alpha)


class Awq(_Scaled):
    """Scales searched for the smallest error of the outputs, and optionally cut largest magnitudes."""

    def _options(self) -> dict[str, Any]:
        return {"method": "awq", "clip": self.case.settings.clip}

    def _look(self, replay: Replay, index: int, linears: dict[str, Any], advance: Callable[[int], None]) -> dict[str, Tensor]:
        # once: every layer of a family with an axis map runs each of its linears once
        return {one.names[0]: one.moments for one in shared_inputs(replay, index, linears, True, advance, once=True)}

    def _scale(self, index: int, layer: nn.Module, coupling: Coupling, inputs: Tensor) -> None:
        # H = 2 E[x x^T]
        size = by_channel(inputs.diagonal() / 2, coupling).mean(1).sqrt()
        rows = torch.cat(self._weights(layer, coupling)).square().mean(0)
        weights = by_channel(rows, coupling).mean(1).sqrt()
        count = channels(self.case.family, coupling, layer)
        none = torch.ones(count, dtype=torch.float64, device=inputs.device)
        best, chosen, least = None, none, self._error(index, layer, coupling, inputs, none)
        before = least
        for alpha in ALPHAS:
            scales = smoothing(size, weights, alpha)
            error = self._error(index, layer, coupling, inputs, scales)
            # strictly: of equals the first stays
            if error < least:
                best, chosen, least = alpha, scales, error
        used = self._fold(layer, coupling, chosen, best)
        told = self._told[coupling.producer]
        told.before, told.after = told.before + before, told.after + least
        if self.case.settings.clip:
            each = per_reader(used, coupling).to(inputs.dtype)
            self._clip(index, layer, coupling, inputs / each / each[:, None])

    def _error(self, index: int, layer: nn.Module, coupling: Coupling, moments: Tensor, scales: Tensor) -> float:
        """tr(D H D^T) of the readers that will be rounded."""
        each = per_reader(scales, coupling).to(torch.float32)
        total = 0.0
        for name, reader in self.case.rounded(index, coupling.readers).items():
            weight, spec = layer.get_parameter(f"{reader}.weight").detach(), self.case.specs[name]
            scaled = weight * each
            off = (decode(encode(scaled, spec, mask=self.case.mask(name, scaled)), spec) - scaled) / each
            total += float(((off @ moments) * off).sum(dtype=torch.float64))
        return total

    def _clip(self, index: int, layer: nn.Module, coupling: Coupling, moments: Tensor) -> None:
        for name, reader in self.case.rounded(index, coupling.readers).items():
            if is_clipped(self.case.family, reader):
                weight = layer.get_parameter(f"{reader}.weight")
                with torch.no_grad():
                    weight.copy_(clip(weight.detach(), self.case.specs[name], moments, self.case.mask(name, weight)))


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """fp64 [n]: inputs^alpha / weights^(1 - alpha), divided by their geometric mean; 1 for a channel without inputs or weights.

    Args:
        inputs: [n], magnitudes of the inputs of each channel, at least 0.
        weights: [n], magnitudes of the weights that read it.
        alpha: Share of the inputs, from 0 to 1.
    """
    live = (inputs > 0) & (weights > 0)
    logs = alpha * inputs.double().clamp(min=1e-30).log() - (1 - alpha) * weights.double().clamp(min=1e-30).log()
    logs = torch.where(live, logs, torch.zeros_like(logs))
    mean = logs.sum() / live.sum().clamp(min=1)
    # within what fp32 weights take without underflow
    return torch.where(live, logs - mean, torch.zeros_like(logs)).clamp(-16, 16).exp()
