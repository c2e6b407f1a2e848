"""The methods of rounding after training: what each needs to know of a linear's inputs, and how it chooses scales and codes.

A method sees the linears that share an input as one stacked weight. Another one (AWQ, SmoothQuant, LLM.int8()) is an entry in ``METHODS``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..fake_quant import Encoded, encode, quantize_with
from ..spec import ActivationSpec, QuantSpec
from .gptq import factorize, gptq_codes
from .mse import absmax_scales, searched_scales

MethodName = Literal["rtn", "mse", "gptq"]
ScaleChoice = Literal["absmax", "mse"]
Needs = Literal["nothing", "diagonal", "hessian"]


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How weights are rounded; what a method does not use, it ignores."""

    method: MethodName = "rtn"
    scale: ScaleChoice = "absmax"
    """gptq: where its scales come from."""
    damping: float = 0.01
    """gptq: share of the Hessian's mean diagonal added to its diagonal."""
    activation_order: bool = True
    """gptq: columns with the largest inputs first."""
    weighted: bool = False
    """mse: the error of a weight counts by the mean square of its input."""
    activations: ActivationSpec | None = None
    """How the inputs of the rounded linears are rounded when the model is served; None = not at all."""
    kv_cache: ActivationSpec | None = None
    """How keys and values are; None = not at all."""

    @property
    def observes(self) -> bool:
        """Whether ranges are taken of the calibration text, for static scales."""
        return any(spec is not None and spec.scaling == "static" for spec in (self.activations, self.kv_cache))

    @property
    def needs(self) -> Needs:
        """What the method has to know of the inputs; anything but 'nothing' takes calibration text, as ``observes`` does."""
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
    """Codes and scales of a stack, as ``fake_quant.Encoded`` has them."""

    codes: Tensor
    """[out, in]; int8 for kind int."""
    scales: Tensor
    """fp32 of ``spec.scale_shape(out, in)``, on the spec's grid."""
    zeros: Tensor | None = None
    """int8 in the shape of ``scales``; None for a symmetric lattice."""
    global_scale: Tensor | None = None
    """fp32 [1], nvfp4 alone."""
    note: str | None = None
    """What did not go as asked, to follow the modules' names."""

    @property
    def encoded(self) -> Encoded:
        """All that belongs to the codes."""
        return Encoded(self.codes, self.scales, self.zeros, self.global_scale)

    def rows(self, rows: slice) -> Encoded:
        """That of some rows; of a stack with one scale for all of it only the whole is a matrix of its own."""
        if len(self.scales) != len(self.codes):
            return self.encoded
        return Encoded(self.codes[rows], self.scales[rows], None if self.zeros is None else self.zeros[rows], self.global_scale)


@dataclass(frozen=True)
class Method:
    """An entry of ``METHODS``."""

    needs: Callable[[Rounding], Needs]
    round: Callable[[Stack, QuantSpec, Rounding], Rounded]


def nearest(stack: Stack, spec: QuantSpec, rounding: Rounding | None = None) -> Rounded:
    """Round to nearest, with the scales that ``fake_quant`` takes from the weights."""
    codes, scales, zeros, whole = encode(stack.weight, spec, mask=stack.mask)
    return Rounded(codes=codes, scales=scales, zeros=zeros, global_scale=whole)


def _searched(stack: Stack, spec: QuantSpec, rounding: Rounding) -> Rounded:
    importance = stack.importance if rounding.weighted else None
    return _to_nearest(stack, searched_scales(stack.weight, spec, stack.mask, importance), spec)


def _gptq(stack: Stack, spec: QuantSpec, rounding: Rounding) -> Rounded:
    assert stack.moments is not None
    if rounding.scale == "mse":
        scales = searched_scales(stack.weight, spec, stack.mask, stack.importance)
    else:
        scales = absmax_scales(stack.weight, spec, stack.mask)
    factor = factorize(stack.moments, rounding.damping, rounding.activation_order)
    if factor is None:
        return _to_nearest(stack, scales, spec, note="rounded to nearest: their Hessian has no Cholesky factor with any damping up to 1")
    note = None
    if factor.damping != rounding.damping:
        note = f"damping raised to {factor.damping:g}: their Hessian has no Cholesky factor with {rounding.damping:g}"
    return Rounded(codes=gptq_codes(stack.weight, scales, factor, spec, stack.mask), scales=scales, note=note)


def _to_nearest(stack: Stack, scales: Tensor, spec: QuantSpec, note: str | None = None) -> Rounded:
    codes, scales = quantize_with(stack.weight, scales, spec, mask=stack.mask)
    return Rounded(codes=codes, scales=scales, note=note)


METHODS: dict[str, Method] = {
    "rtn": Method(lambda _: "nothing", nearest),
    "mse": Method(lambda rounding: "diagonal" if rounding.weighted else "nothing", _searched),
    "gptq": Method(lambda _: "hessian", _gptq),
}
