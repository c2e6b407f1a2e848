"""Fake quantization of activations, and of keys and values on their way into the cache, by the ops for weights with tokens as rows."""

import torch
from torch import Tensor

from ..spec import ActivationSpec
from .absmax import fake_quant
from .dispatch import Backend, grid_numbers
from .float_reference import global_scale
from .floats import fake_quant_float, float_scales
from .learned import fake_quant_learned
from .range_reference import grid_of_range


def _given(scale: Tensor | None, zero: Tensor | None, x: Tensor, spec: ActivationSpec) -> tuple[Tensor, Tensor | None]:
    """Checks scale and zero point of static scaling and returns them as [1, 1]."""
    if scale is None:
        raise ValueError("scaling='static' needs a scale: fp32, one number, as static_scale() makes it of an observed range")
    if scale.numel() != 1 or scale.dtype != torch.float32 or scale.device != x.device:
        raise ValueError(f"scale must be one float32 number on {x.device}; got {scale.dtype} of {tuple(scale.shape)} on {scale.device}")
    if (zero is None) != spec.symmetric:
        remedy = "leave zero out" if spec.symmetric else "give zero, int8, as static_scale() makes it"
        raise ValueError(f"symmetric={str(spec.symmetric).lower()}: {remedy}")
    # [1, 1] is the form of one scale for the whole matrix
    return scale.detach().view(1, 1), None if zero is None else zero.view(1, 1)


def fake_quant_activation(
    x: Tensor,
    spec: ActivationSpec,
    *,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Activations as codes times scales, differentiable in ``x`` by the straight-through estimator with a clip mask.

    Dynamic scaling computes the scale (and zero point) of each token from its own values: int8 as ``absmax_reference.py`` with divisor 127,
    or ``range_reference.py``; fp8 and mxfp4 as ``float_reference.py``. Static scaling takes them as given; of nvfp4 the global scale G is
    given, and scales per 16 features are computed from the values. Scales are constants in the gradient.

    Args:
        x: [..., features] (keys or values: [..., head_dim]), float32, bfloat16 or float16; a token is a row of the last axis.
        spec: The quantization of the activations; groups of mxfp4 and nvfp4 divide the features.
        scale: One fp32 number, only for static scaling.
        zero: One int8 number, only for static scaling with symmetric=False.
        backend: As in ``fake_quant``.

    Returns:
        Shape and dtype of ``x``, contiguous. A token with a NaN or infinity becomes NaN (with static scaling only the element does).

    Raises:
        ValueError: dtype, scale, zero or back end do not fit.

    With ``spec.outliers`` values of at least that magnitude pass unrounded, and the scale of a token is that of its other values. For one
    token that is what bitsandbytes computes; of several at once it leaves whole columns unrounded that hold such a value in any of them.

    Source: Dettmers et al., LLM.int8(), arXiv 2208.07339, section 2.1 (per-token absmax) and 3.2 (outliers); Jacob et al., arXiv
    1712.05877, eq. 1.
    """
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"activations must be floating point [..., features], not {x.dtype} of shape {tuple(x.shape)}")
    # [..., features] -> [tokens, features]: a token takes the place of a weight's row
    rows = x.reshape(-1, x.shape[-1])
    own = spec.matrix_spec
    if spec.outliers is not None and spec.of_the_others is not None:
        # a threshold for each value, not for each column of a batch: which tokens are computed together must not change any of them
        # infinity is none, so that it spoils the rounded values of its token as without outliers
        sizes = rows.detach().abs()
        large = (sizes >= spec.outliers) & (sizes < torch.inf)
        rounded = fake_quant_activation(rows.masked_fill(large, 0), spec.of_the_others, scale=scale, zero=zero, backend=backend)
        return torch.where(large, rows, rounded).view(x.shape)
    if spec.scaling == "dynamic":
        if scale is not None or zero is not None:
            raise ValueError("scaling='dynamic' takes scales from the values; leave scale and zero out, or use scaling='static'")
        # [tokens, features] with one scale per row, which is one per token
        return fake_quant(rows, own, backend=backend).view(x.shape)
    scale, zero = _given(scale, zero, x, spec)
    # static: one given scale for all tokens; int8 may also have a zero point
    if spec.kind == "int8":
        return fake_quant_learned(rows, scale, own, zeros=zero, backend=backend).view(x.shape)
    if spec.kind == "nvfp4":
        divides, _, _ = float_scales(rows, own, None, whole=scale.view(1))
        return fake_quant_float(rows, divides, None, own.kind, own.group_width(rows.shape[1]), backend).view(x.shape)
    return fake_quant_float(rows, scale, None, own.kind, rows.shape[1], backend).view(x.shape)


@torch.no_grad()
def static_scale(low: Tensor, high: Tensor, spec: ActivationSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for static scaling, from an observed range of values (calibrated, or a moving average).

    Args:
        low: fp32 [], smallest value seen; values above 0 act as 0, so that zero is a code.
        high: fp32 [], largest value seen; values below 0 act as 0.
        spec: The quantization of the activations.

    Returns:
        (scale fp32 [], of nvfp4 the global scale 448 * 6 / absmax; zero int8 [] or None when the spec is symmetric); scale 1 for the range
        [0, 0], NaN for a broken one.
    """
    own = spec.matrix_spec
    low, high = low.to(torch.float32).clamp(max=0.0), high.to(torch.float32).clamp(min=0.0)
    if spec.kind == "nvfp4":
        return global_scale(torch.maximum(-low, high)), None
    # as for weights with one scale, but on the fp32 grid of activation scales
    scale, zero = grid_of_range(low, high, own.bits, spec.symmetric, own.divisor_value, grid_numbers(own))
    return scale, None if spec.symmetric else zero
