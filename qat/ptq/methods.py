"""The methods of rounding after training: what each needs to know of a linear's inputs, and how it chooses scales and codes.

A method sees the linears that share an input as one stacked weight. Another one (AWQ, SmoothQuant, LLM.int8()) is an entry in ``METHODS``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..fake_quant import quantize_with
from ..spec import QuantSpec
from .fit import fitted_codes
from .gptq import factorize, gptq_codes
from .mse import COARSE_FACTORS, FACTORS, absmax_scales, searched_scales

MethodName = Literal["rtn", "mse", "gptq"]
ScaleChoice = Literal["absmax", "mse", "fitted"]
Needs = Literal["nothing", "diagonal", "hessian"]


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How weights are rounded; what a method does not use, it ignores."""

    method: MethodName = "rtn"
    scale: ScaleChoice = "fitted"
    """gptq: where its scales come from: the largest magnitude, a search for the least error of each weight, or that search and then least
    squares over the outputs in turn with the rounding."""
    damping: float = 0.01
    """gptq: share of the Hessian's mean diagonal added to its diagonal."""
    activation_order: bool = True
    """gptq: columns with the largest inputs first."""
    weighted: bool = False
    """mse: the error of a weight counts by the mean square of its input."""

    @property
    def needs(self) -> Needs:
        """What has to be known of the inputs; anything but 'nothing' takes calibration text."""
        return METHODS[self.method].needs(self)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Weights of linears with the same input, one below the other."""

    weight: Tensor
    """fp32 [out, in], finite."""
    mask: Tensor | None
    """bool [out, in], True where a weight is kept; None keeps all."""
    moments: Tensor | None
    """fp32 [in, in] or [in], as in ``SharedInput``; None when nothing is known of the inputs."""

    @property
    def importance(self) -> Tensor | None:
        """fp32 [in]: twice the mean square of each input."""
        return self.moments.diagonal() if self.moments is not None and self.moments.ndim == 2 else self.moments


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Codes and scales of a stack."""

    codes: Tensor
    """int8 [out, in]."""
    scales: Tensor
    """fp32 [out, groups], on the spec's grid."""
    note: str | None = None
    """What did not go as asked, to follow the modules' names."""


@dataclass(frozen=True)
class Method:
    """An entry of ``METHODS``."""

    needs: Callable[[Rounding], Needs]
    round: Callable[[Stack, QuantSpec, Rounding], Rounded]


def nearest(stack: Stack, spec: QuantSpec, rounding: Rounding | None = None) -> Rounded:
    """Round to nearest with absmax scales."""
    return _to_nearest(stack, absmax_scales(stack.weight, spec, stack.mask), spec)


def _searched(stack: Stack, spec: QuantSpec, rounding: Rounding) -> Rounded:
    importance = stack.importance if rounding.weighted else None
    return _to_nearest(stack, searched_scales(stack.weight, spec, stack.mask, importance), spec)


def _gptq(stack: Stack, spec: QuantSpec, rounding: Rounding) -> Rounded:
    assert stack.moments is not None
    if rounding.scale == "absmax":
        scales = absmax_scales(stack.weight, spec, stack.mask)
    else:
        factors = COARSE_FACTORS if rounding.scale == "fitted" else FACTORS
        scales = searched_scales(stack.weight, spec, stack.mask, stack.importance, factors)
    factor = factorize(stack.moments, rounding.damping, rounding.activation_order)
    if factor is None:
        return _to_nearest(stack, scales, spec, note="rounded to nearest: their Hessian has no Cholesky factor with any damping up to 1")
    note = None
    if factor.damping != rounding.damping:
        note = f"damping raised to {factor.damping:g}: their Hessian has no Cholesky factor with {rounding.damping:g}"
    if rounding.scale == "fitted":
        codes, scales = fitted_codes(stack.weight, scales, stack.moments, factor, spec, stack.mask)
    else:
        codes = gptq_codes(stack.weight, scales, factor, spec, stack.mask)
    return Rounded(codes=codes, scales=scales, note=note)


def _to_nearest(stack: Stack, scales: Tensor, spec: QuantSpec, note: str | None = None) -> Rounded:
    codes, scales = quantize_with(stack.weight, scales, spec, mask=stack.mask)
    return Rounded(codes=codes, scales=scales, note=note)


METHODS: dict[str, Method] = {
    "rtn": Method(lambda _: "nothing", nearest),
    "mse": Method(lambda rounding: "diagonal" if rounding.weighted else "nothing", _searched),
    "gptq": Method(lambda _: "hessian", _gptq),
}
