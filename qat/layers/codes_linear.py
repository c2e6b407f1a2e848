"""CodesLinear: a linear layer with fixed codes whose scales train. A weight takes one byte, without gradient and optimizer moments."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fake_quant import Encoded, dequantize
from ..fake_quant.dispatch import grid_numbers
from ..fake_quant.learned import group_factor, scale_on_grid
from ..fake_quant.learned_reference import back_inside
from ..spec import QuantSpec


class CodesLinear(nn.Module):
    """A linear layer with fixed codes, one byte each, whose scales and bias train.

    Source: Chen et al., EfficientQAT, arXiv 2407.11062, section 3.3 (end-to-end training of quantization parameters).
    """

    code: Tensor
    """int8 [out, in]; in the state dict."""
    scale: nn.Parameter
    """fp32 [out, groups], positive."""
    zero: Tensor | None
    """int8 in the shape of ``scale``, constants; None for a symmetric spec. In the state dict."""
    bias: nn.Parameter | None

    def __init__(self, encoded: Encoded, bias: nn.Parameter | None, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.out_features, self.in_features = encoded.codes.shape
        # buffers, so that checkpoints hold the codes; they get neither gradients nor optimizer moments
        self.register_buffer("code", encoded.codes)
        self.register_buffer("zero", encoded.zeros)
        self.scale = nn.Parameter(encoded.scales)
        self.register_parameter("bias", bias)

    def quantized_weight(self) -> Tensor:
        """fp32 [out, in]: codes times scales on their grid, without a gradient."""
        return dequantize(self.code, scale_on_grid(self.scale, self.spec), self.zero)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]; differentiable in input, scale and bias."""
        return _codes_linear(input, self.code, self.zero, self.scale, self.spec, self.bias)

    @torch.no_grad()
    def encoded(self) -> Encoded:
        """The codes, the scales on their grid and the zero points; ValueError if a scale is NaN or infinite."""
        scales = scale_on_grid(self.scale, self.spec)
        if not bool(torch.isfinite(scales).all()):
            raise ValueError(f"{int((~torch.isfinite(scales)).sum())} of {scales.numel()} scales are NaN or infinite")
        return Encoded(self.code, scales, self.zero)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.spec.bits}, group_size={self.spec.group_size}, codes fixed"
        )


def _codes_linear(input: Tensor, codes: Tensor, zeros: Tensor | None, scale: Tensor, spec: QuantSpec, bias: Tensor | None) -> Tensor:
    return _CodesProduct.apply(input, codes, zeros, scale, spec, bias)  # pyright: ignore[reportReturnType]


class _CodesProduct(torch.autograd.Function):
    """x @ ((codes - zeros) * s)^T. The backward pass decodes the weight again, so that no layer keeps it in fp32.

    dL/ds = 1 / sqrt(N qmax) * sum over the group of dL/dw * (code - zero), the gradient of LSQ with fixed codes.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, codes: Tensor, zeros: Tensor | None, scale: Tensor, spec: QuantSpec, bias: Tensor | None
    ) -> Tensor:
        # the codes and not the weight: a quarter of its bytes, and they are there anyway
        ctx.save_for_backward(input, codes, zeros, scale, bias)
        ctx.spec = spec
        # noted here, because autocast is off while the backward pass runs
        ctx.cast = torch.get_autocast_dtype(input.device.type) if torch.is_autocast_enabled(input.device.type) else None
        # the fp32 weight exists only during this product; between the passes a weight takes the one byte of its code
        return F.linear(input, dequantize(codes, scale_on_grid(scale, spec), zeros), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, Tensor | None]:
        input, codes, zeros, scale, bias = ctx.saved_tensors
        grad, dtype = grads[0], ctx.cast or torch.float32
        given = scale_gradient = None
        if ctx.needs_input_grad[0]:
            weight = dequantize(codes, scale_on_grid(scale, ctx.spec), zeros).to(dtype)
            # dL/dx: [..., out] @ [out, in]
            given = (grad.to(dtype) @ weight).to(input.dtype)
        if ctx.needs_input_grad[3]:
            # dL/dw [out, in], summed over tokens: [out, tokens] @ [tokens, in]
            rows = grad.flatten(0, -2).to(dtype).T @ input.flatten(0, -2).to(dtype)
            # code - zero, as the decoded weight with scales of one
            # [out, in] -> [out, groups, group size] -> [out, groups]; [1, 1] with one scale for the matrix
            sums = (rows.to(torch.float32) * dequantize(codes, torch.ones_like(scale), zeros)).view(*scale.shape, -1).sum(-1)
            scale_gradient = back_inside(sums * group_factor(codes, scale, ctx.spec), scale, grid_numbers(ctx.spec))
        bias_gradient = grad.flatten(0, -2).sum(0).to(torch.float32) if bias is not None and ctx.needs_input_grad[5] else None
        return given, None, None, scale_gradient, None, bias_gradient
