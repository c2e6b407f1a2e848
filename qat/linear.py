"""Linear layers whose weight is rounded in every forward: with latent weights that train, or with codes that stay and scales that train.

``QuantLinear`` keeps the parameters of the linear it is made from and may add its own: a scale for each group (LSQ), and a low-rank
adapter whose product is added to the weight before rounding. ``CodesLinear`` keeps codes of one byte instead of a weight.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fake_quant import dequantize, fake_quant, fake_quant_learned, quantize, quantize_with
from .fake_quant.dispatch import grid_numbers
from .fake_quant.learned import group_factor, scale_on_grid
from .fake_quant.learned_reference import back_inside
from .spec import QuantSpec

Mode = Literal["off", "absmax", "learned", "fixed"]
"""off: the weight passes unrounded; absmax: scales are taken from the weight; learned: the scale parameter trains; fixed: it does not."""


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What ``QuantLinear`` gets beside weight and bias."""

    scale: bool = False
    """A scale parameter for each group."""
    rank: int = 0
    """Rank of an adapter that trains in the weight's place; 0 = none."""


class QuantLinear(nn.Linear):
    """``nn.Linear`` whose weight goes through fake quantization in every forward, in training and in evaluation alike.

    The parameters ``weight`` [out, in] (latent, unrounded) and ``bias`` are those of the linear it is made from.
    """

    mask: Tensor | None
    """bool [out, in], True where a weight is kept; pruned weights are zeros before scales are taken. Not in the state dict."""
    scale: nn.Parameter | None
    """fp32 [out, groups], positive; None where scales are always taken from the weight."""
    adapter_in: nn.Parameter | None
    """fp32 [rank, in]; the weight that is rounded is ``weight + adapter_out @ adapter_in``."""
    adapter_out: nn.Parameter | None
    """fp32 [out, rank]."""

    def __init__(self, linear: nn.Linear, spec: QuantSpec, extras: Extras | None = None) -> None:
        # on the meta device: nothing is allocated, no random number is drawn
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        shape = spec.scale_shape(linear.out_features, linear.in_features)
        self.spec = spec
        self.mode: Mode = "absmax"
        self.bits = spec.bits
        """Bits of the lattice in use: the spec's, or more while bits are annealed."""
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.register_buffer("mask", None, persistent=False)
        extras = extras or Extras()
        self.scale = self._extra(*shape) if extras.scale else None
        self.adapter_in = self._extra(extras.rank, linear.in_features) if extras.rank else None
        self.adapter_out = self._extra(linear.out_features, extras.rank) if extras.rank else None
        if extras.rank:
            self.weight.requires_grad_(False)
        self.train(linear.training)

    def is_extra(self, parameter: str) -> bool:
        """Whether the layer has this parameter beside those of the linear it was made from: no model file has values for it."""
        return parameter in ("scale", "adapter_in", "adapter_out")

    def _extra(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=self.weight.device))

    def set_mask(self, mask: Tensor | None) -> None:
        """Weights to keep: bool [out, in], or None for all; moved to the weight's device."""
        if mask is not None and (mask.dtype != torch.bool or mask.shape != self.weight.shape):
            raise ValueError(f"mask must be bool of shape {tuple(self.weight.shape)}, not {mask.dtype} of shape {tuple(mask.shape)}")
        self.mask = None if mask is None else mask.to(self.weight.device)

    @property
    def lattice(self) -> QuantSpec:
        """The lattice in use."""
        return self.spec if self.bits == self.spec.bits else self.spec.with_bits(self.bits)

    def merged_weight(self) -> Tensor:
        """[out, in]: the latent weight, with the adapter's product added; pruned weights (zeros of ``weight``) stay zero."""
        if self.adapter_in is None or self.adapter_out is None:
            return self.weight
        with torch.autocast(self.weight.device.type, enabled=False):
            update = self.adapter_out @ self.adapter_in
        # a sharded layer has no mask of the whole weight; the frozen zeros are one
        return self.weight + update * (self.weight != 0)

    def quantized_weight(self) -> Tensor:
        """[out, in]: the weight as codes times scales, differentiable in whatever trains."""
        weight = self.merged_weight()
        if self.mode == "learned":
            assert self.scale is not None
            return fake_quant_learned(weight, self.scale, self.lattice, mask=self.mask)
        if self.mode == "fixed":
            assert self.scale is not None
            rounded = fake_quant_learned(weight, self.scale.detach(), self.lattice, mask=self.mask)
        else:
            rounded = weight if self.mode == "off" else fake_quant(weight, self.lattice, mask=self.mask)
        # DDP waits for a gradient of every parameter, used or not
        return rounded if self.scale is None or not self.scale.requires_grad else _Attached.apply(rounded, self.scale)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(input, self.quantized_weight(), self.bias)

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """(codes int8 [out, in], scales fp32 [out, groups]) of the spec: by the scale parameter where there is one, else from the weight.

        Raises:
            ValueError: weights or scales are NaN or infinite.
        """
        if self.scale is None:
            return quantize(self.merged_weight(), self.spec, mask=self.mask)
        return quantize_with(self.merged_weight(), self.scale, self.spec, mask=self.mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.spec.bits}, group_size={self.spec.group_size}, scales={self.mode}"


class _Attached(torch.autograd.Function):
    """A tensor as it is, with a parameter of which the gradient is zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, parameter: Tensor) -> Tensor:
        ctx.save_for_backward(parameter)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (parameter,) = ctx.saved_tensors
        return grads[0], torch.zeros_like(parameter)


class CodesLinear(nn.Module):
    """A linear layer of fixed codes, whose scales train: a byte a weight, no gradient and no optimizer state for it.

    Source: Chen et al., EfficientQAT, arXiv 2407.11062, section 3.3 (end-to-end training of quantization parameters).
    """

    code: Tensor
    """int8 [out, in]; in the state dict."""
    scale: nn.Parameter
    """fp32 [out, groups], positive."""
    bias: nn.Parameter | None

    def __init__(self, codes: Tensor, scale: Tensor, bias: nn.Parameter | None, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.out_features, self.in_features = codes.shape
        self.register_buffer("code", codes)
        self.scale = nn.Parameter(scale)
        self.register_parameter("bias", bias)

    def quantized_weight(self) -> Tensor:
        """fp32 [out, in]: codes times scales on their grid; a constant."""
        return dequantize(self.code, scale_on_grid(self.scale, self.spec))

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]; differentiable in input, scale and bias."""
        return _codes_linear(input, self.code, self.scale, self.spec, self.bias)

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """(codes int8 [out, in], scales fp32 [out, groups] on their grid); ValueError when a scale is NaN or infinite."""
        scales = scale_on_grid(self.scale, self.spec)
        if not bool(torch.isfinite(scales).all()):
            raise ValueError(f"{int((~torch.isfinite(scales)).sum())} of {scales.numel()} scales are NaN or infinite")
        return self.code, scales

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.spec.bits}, group_size={self.spec.group_size}, codes fixed"
        )


def _codes_linear(input: Tensor, codes: Tensor, scale: Tensor, spec: QuantSpec, bias: Tensor | None) -> Tensor:
    return _CodesProduct.apply(input, codes, scale, spec, bias)  # pyright: ignore[reportReturnType]


class _CodesProduct(torch.autograd.Function):
    """x @ (codes * s)^T: the weight is made anew in the backward, so that no layer's is kept in fp32.

    dL/ds = 1 / sqrt(N qmax) * sum over the group of dL/dw * code, the gradient of LSQ with the codes held.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, codes: Tensor, scale: Tensor, spec: QuantSpec, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, codes, scale, bias)
        ctx.spec = spec
        ctx.cast = torch.get_autocast_dtype(input.device.type) if torch.is_autocast_enabled(input.device.type) else None
        return F.linear(input, dequantize(codes, scale_on_grid(scale, spec)), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, Tensor | None]:
        input, codes, scale, bias = ctx.saved_tensors
        grad, dtype = grads[0], ctx.cast or torch.float32
        given = scale_gradient = None
        if ctx.needs_input_grad[0]:
            weight = dequantize(codes, scale_on_grid(scale, ctx.spec)).to(dtype)
            given = (grad.to(dtype) @ weight).to(input.dtype)
        if ctx.needs_input_grad[2]:
            rows = grad.flatten(0, -2).to(dtype).T @ input.flatten(0, -2).to(dtype)
            sums = (rows.to(torch.float32) * codes).view(*scale.shape, -1).sum(-1)
            scale_gradient = back_inside(sums * group_factor(codes, scale, ctx.spec), scale, grid_numbers(ctx.spec))
        bias_gradient = grad.flatten(0, -2).sum(0).to(torch.float32) if bias is not None and ctx.needs_input_grad[4] else None
        return given, None, scale_gradient, None, bias_gradient
