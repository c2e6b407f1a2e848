"""The methods of post-training quantization: what each needs to know of a linear's inputs, and how it chooses scales and codes.

A method gets the linears that share an input as one stacked weight. A new method (AWQ, for example) is an entry in ``METHODS``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...models.calibration.factor import factorize
from ..fake_quant import Encoded, decode, encode, quantize_with
from ..fake_quant.floats import float_codes, float_scales
from ..fake_quant.ranges import range_grid
from ..fake_quant.super_blocks import super_codes_with
from ..fake_quant.super_reference import SubScales, kept_weights, scales_of_weight
from ..rounding_method import NEEDS, Needs, RoundingMethod
from ..rounding_method import MethodName as MethodName
from ..rounding_method import ScaleChoice as ScaleChoice
from ..spec import QuantSpec
from .float_scales import FloatScales, searched_floats
from .gptq import gptq_codes
from .mse import FACTORS, FITTED_FACTORS, SearchedScales, searched_grid
from .scale_fit import fitted_codes
from .super_gptq import fitted_super_codes, super_gptq_pass
from .super_search import SuperScales, searched_super


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Weights of linears with the same input, stacked along out; one linear alone if the spec has one scale per matrix."""

    weight: Tensor
    """fp32 [out, in], finite."""
    mask: Tensor | None
    """bool [out, in], True where a weight is kept; None keeps all."""
    moments: Tensor | None
    """fp32 [in, in] or [in], as in ``SharedInput``; None when nothing is known of the inputs."""

    @property
    def importance(self) -> Tensor | None:
        """fp32 [in]: twice the mean square of each input."""
        # H_ii = 2 E[x_i^2]; with method mse the moments may be that diagonal already
        return self.moments.diagonal() if self.moments is not None and self.moments.ndim == 2 else self.moments


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Codes and scales of a stack, as ``fake_quant.Encoded`` has them."""

    codes: Tensor
    """[out, in]; int8 for kind int."""
    scales: Tensor
    """fp32 of ``spec.scale_shape(out, in)``, on the spec's grid."""
    zeros: Tensor | None = None
    """int8 in the shape of ``scales``; None for a symmetric spec."""
    global_scale: Tensor | None = None
    """fp32 [1], only for nvfp4."""
    sub: SubScales | None = None
    """Only for kinds with super-blocks."""
    note: str | None = None
    """What differs from the settings, printed after the modules' names; None if nothing does."""

    @property
    def encoded(self) -> Encoded:
        """Codes, scales and zero points without the note."""
        return Encoded(self.codes, self.scales, self.zeros, self.global_scale, self.sub)

    def rows(self, rows: slice) -> Encoded:
        """``encoded`` of some rows. A stack with one scale in total is one linear, so it is returned whole."""
        # [1, 1] scales
        if len(self.scales) != len(self.codes):
            return self.encoded
        zeros, sub = None if self.zeros is None else self.zeros[rows], self.sub and self.sub.rows(rows)
        return Encoded(self.codes[rows], self.scales[rows], zeros, self.global_scale, sub)

    def values(self, spec: QuantSpec) -> Tensor:
        """fp32 [out, in]: the decoded weights."""
        return decode(self.encoded, spec)


@dataclass(frozen=True)
class Method:
    """An entry of ``METHODS``."""

    needs: Callable[[RoundingMethod], Needs]
    round: Callable[[Stack, QuantSpec, RoundingMethod], Rounded]


def round_to_nearest(stack: Stack, spec: QuantSpec, rounding: RoundingMethod | None = None) -> Rounded:
    """Rounds to nearest with scales from the largest magnitude or the range, as ``fake_quant`` does, for every kind."""
    codes, scales, zeros, whole, sub = encode(stack.weight, spec, mask=stack.mask)
    return Rounded(codes=codes, scales=scales, zeros=zeros, global_scale=whole, sub=sub)


def _searched(stack: Stack, spec: QuantSpec, rounding: RoundingMethod) -> Rounded:
    importance = stack.importance if rounding.weighted else None
    if spec.super_block:
        return _super_nearest(stack, searched_super(stack.weight, spec.kind, stack.mask, importance), spec)
    if spec.kind != "int":
        scales = searched_floats(stack.weight, spec, stack.mask, importance)
        return _of_floats(float_codes(stack.weight, scales.divides, spec, stack.mask), scales)
    return _to_nearest(stack, searched_grid(stack.weight, spec, stack.mask, importance), spec)


def _gptq(stack: Stack, spec: QuantSpec, rounding: RoundingMethod) -> Rounded:
    if spec.super_block:
        return _super_gptq(stack, spec, rounding)
    assert stack.moments is not None
    if spec.kind != "int":
        return _gptq_floats(stack, spec, rounding)
    # scales come first, because GPTQ rounds with given scales; a fit afterwards changes them for the codes that came out
    if rounding.scale == "absmax":
        grid = SearchedScales(*range_grid(stack.weight, spec, stack.mask, "auto"))
    else:
        factors = FITTED_FACTORS if rounding.scale == "fitted" else FACTORS
        grid = searched_grid(stack.weight, spec, stack.mask, stack.importance, factors)
    # one factorization for all stacked linears: H depends on their common input alone
    factor = factorize(stack.moments, rounding.damping, rounding.activation_order)
    # rounding to nearest needs no Hessian; the note reports it
    if factor is None:
        return _to_nearest(stack, grid, spec, note=_NO_FACTOR)
    note = _raised(factor.damping, rounding)
    scales, zeros = grid
    if rounding.scale == "fitted":
        codes, scales = fitted_codes(stack.weight, grid, stack.moments, factor, spec, stack.mask)
    else:
        codes = gptq_codes(stack.weight, scales, factor, spec, stack.mask, zeros)
    return Rounded(codes=codes, scales=scales, zeros=zeros, note=note)


def _super_gptq(stack: Stack, spec: QuantSpec, rounding: RoundingMethod) -> Rounded:
    assert stack.moments is not None
    if rounding.scale == "absmax":
        found = SuperScales(*scales_of_weight(kept_weights(stack.weight, stack.mask), spec.kind))
    else:
        found = searched_super(stack.weight, spec.kind, stack.mask, stack.importance)
    factor = factorize(stack.moments, rounding.damping, rounding.activation_order)
    if factor is None:
        return _super_nearest(stack, found, spec, note=_NO_FACTOR)
    if rounding.scale == "fitted":
        codes, found = fitted_super_codes(stack.weight, found, stack.moments, factor, spec.kind, stack.mask)
    else:
        codes = super_gptq_pass(stack.weight, found, factor, spec.kind, stack.mask).codes
    return Rounded(codes=codes, scales=found.scales, sub=found.sub, note=_raised(factor.damping, rounding))


def _super_nearest(stack: Stack, found: SuperScales, spec: QuantSpec, note: str | None = None) -> Rounded:
    codes = super_codes_with(kept_weights(stack.weight, stack.mask), found.scales, found.sub, spec)
    return Rounded(codes=codes, scales=found.scales, sub=found.sub, note=note)


def _to_nearest(stack: Stack, grid: SearchedScales, spec: QuantSpec, note: str | None = None) -> Rounded:
    codes, scales = quantize_with(stack.weight, grid.scales, spec, zeros=grid.zeros, mask=stack.mask)
    return Rounded(codes=codes, scales=scales, zeros=grid.zeros, note=note)


def _gptq_floats(stack: Stack, spec: QuantSpec, rounding: RoundingMethod) -> Rounded:
    assert stack.moments is not None
    if rounding.scale == "absmax":
        divides, stored, whole = float_scales(stack.weight, spec, stack.mask)
        scales = FloatScales(divides, stored, whole if spec.kind == "nvfp4" else None)
    else:
        # a fit by least squares would leave the few numbers that such scales can be
        scales = searched_floats(stack.weight, spec, stack.mask, stack.importance)
    factor = factorize(stack.moments, rounding.damping, rounding.activation_order)
    if factor is None:
        return _of_floats(float_codes(stack.weight, scales.divides, spec, stack.mask), scales, _NO_FACTOR)
    codes = gptq_codes(stack.weight, scales.divides, factor, spec, stack.mask)
    return _of_floats(codes, scales, _raised(factor.damping, rounding))


def _of_floats(codes: Tensor, scales: FloatScales, note: str | None = None) -> Rounded:
    return Rounded(codes=codes, scales=scales.stored, global_scale=scales.whole, note=note)


_NO_FACTOR = "rounded to nearest: their Hessian has no Cholesky factor with any damping up to 1"


def _raised(damping: float, rounding: RoundingMethod) -> str | None:
    """The note on a Hessian that needed more damping than asked for; None if it did not."""
    if damping == rounding.damping:
        return None
    return f"damping raised to {damping:g}: their Hessian has no Cholesky factor with {rounding.damping:g}"


METHODS: dict[str, Method] = {
    "rtn": Method(NEEDS["rtn"], round_to_nearest),
    "mse": Method(NEEDS["mse"], _searched),
    "gptq": Method(NEEDS["gptq"], _gptq),
}
