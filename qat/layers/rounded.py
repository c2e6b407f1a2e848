"""RoundedWeight: the common part of modules that round their weight in every forward pass, with the parameters of the rounding."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..fake_quant import Encoded, encode, fake_quant, fake_quant_learned, quantize_with
from ..fake_quant.floats import shared_global_scale
from ..spec import QuantSpec

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object

Mode = Literal["off", "absmax", "learned", "fixed"]
"""off: the weight is not rounded; absmax: scales are taken from the weight; learned: the scale parameter trains; fixed: it does not."""
_EXTRAS = ("scale", "zero", "adapter_in", "adapter_out")


@dataclass(frozen=True, kw_only=True)
class Extras:
    """Further parameters of a module that rounds its weight."""

    scale: bool = False
    """Whether each group gets a scale parameter (only kind int), and a zero point if the spec has them."""
    rank: int = 0
    """Rank of an adapter that trains instead of the weight; 0 = none."""


class RoundedWeight(_Base):
    """Mixin of a module with a ``weight`` [out, in]; call ``set_spec`` after the weight is set.

    The parameters ``weight`` (latent, unrounded) and ``bias`` are those of the module it is made from.
    """

    weight: Tensor
    mask: Tensor | None
    """bool [out, in], True where a weight is kept; pruned weights are set to zero before scales are taken. Not in the state dict."""
    scale: nn.Parameter | None
    """fp32 of ``spec.scale_shape``, positive; None if scales are always taken from the weight."""
    zero: nn.Parameter | None
    """fp32 in the shape of ``scale``, whole numbers that do not train; None for a symmetric spec."""
    adapter_in: nn.Parameter | None
    """fp32 [rank, in]; the rounded weight is that of ``weight + adapter_out @ adapter_in``."""
    adapter_out: nn.Parameter | None
    """fp32 [out, rank]."""

    def set_spec(self, spec: QuantSpec, extras: Extras | None) -> None:
        """Gives the module its quantization spec; extras are zero until the caller sets them."""
        rows, columns = self.weight.shape
        shape = spec.scale_shape(rows, columns)
        self.spec = spec
        # scale parameters are zero until the caller sets them, so they are not in use yet
        self.mode: Mode = "absmax"
        self.current_spec = spec
        """The spec in use: with more bits than ``spec`` while bits are annealed."""
        self.register_buffer("mask", None, persistent=False)
        self.joined: tuple[RoundedWeight, ...] = ()
        """nvfp4: the modules that servers join into one matrix, this one among them; they share a global scale."""
        extras = extras or Extras()
        # only integer codes have learned scales; the other kinds fix how a scale is found
        own = extras.scale and spec.kind == "int"
        self.scale = self._extra(*shape) if own else None
        self.zero = self._extra(*shape) if own and not spec.symmetric else None
        if self.zero is not None:
            # a stored zero point is an integer, which gradient steps cannot move
            self.zero.requires_grad_(False)
        self.adapter_in = self._extra(extras.rank, columns) if extras.rank else None
        self.adapter_out = self._extra(rows, extras.rank) if extras.rank else None
        if extras.rank:
            self.weight.requires_grad_(False)

    def is_extra(self, parameter: str) -> bool:
        """Whether this parameter was added to those of the original module, so that no model file has values for it."""
        return parameter in _EXTRAS

    def _extra(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=self.weight.device))

    @property
    def bits(self) -> int:
        """Bits in use: those of the spec, or more while bits are annealed."""
        return self.current_spec.bits

    @bits.setter
    def bits(self, bits: int) -> None:
        # made here and not in every forward pass, because torch.compile cannot trace the checks of a new spec
        self.current_spec = self.spec if bits == self.spec.bits else self.spec.with_bits(bits)

    def merged_weight(self) -> Tensor:
        """[out, in]: the latent weight plus the adapter's product; pruned weights (zeros of ``weight``) stay zero."""
        if self.adapter_in is None or self.adapter_out is None:
            return self.weight
        # in fp32: autocast would round the update to the 8 significant bits of bf16
        with torch.autocast(self.weight.device.type, enabled=False):
            update = self.adapter_out @ self.adapter_in
        # the frozen weight's zeros are used and not ``mask``, which a sharded layer has for its own rows only
        return self.weight + update * (self.weight != 0)

    def quantized_weight(self) -> Tensor:
        """[out, in]: the weight as codes times scales, differentiable in all parameters that train."""
        weight, scale = self.merged_weight(), self.scale
        # off, or scales from the weight: a scale parameter is not used
        if self.mode == "off" or scale is None or self.mode == "absmax":
            rounded = weight if self.mode == "off" else fake_quant(weight, self.current_spec, mask=self.mask, whole=self._whole())
            # DDP waits for a gradient of every parameter, used or not
            return rounded if scale is None or not scale.requires_grad else _Attached.apply(rounded, scale)
        # learned or fixed: the scale parameter is used
        given = scale if self.mode == "learned" else scale.detach()
        rounded = fake_quant_learned(weight, given, self.current_spec, zeros=self.zero_codes(), mask=self.mask)
        return rounded if self.mode == "learned" or not scale.requires_grad else _Attached.apply(rounded, scale)

    def _whole(self) -> Tensor | None:
        """fp32 [1]: the global scale that this weight shares with others; None if it shares none."""
        return shared_global_scale([(one.merged_weight(), one.mask) for one in self.joined]) if self.joined else None

    def zero_codes(self) -> Tensor | None:
        """int8 zero points in the shape of ``scale``; None for a symmetric spec."""
        return None if self.zero is None else self.zero.detach().to(torch.int8)

    @torch.no_grad()
    def encoded(self) -> Encoded:
        """Codes, scales and zero points, with scales from the scale parameter if there is one, else from the weight.

        Raises:
            ValueError: weights or scales are NaN or infinite.
        """
        if self.scale is None:
            return encode(self.merged_weight(), self.spec, mask=self.mask, whole=self._whole())
        zeros = self.zero_codes()
        return Encoded(*quantize_with(self.merged_weight(), self.scale, self.spec, zeros=zeros, mask=self.mask), zeros)

    def spec_repr(self) -> str:
        """The spec as part of the module's repr."""
        return f"bits={self.spec.bits}, group_size={self.spec.group_size}, scales={self.mode}"


class _Attached(torch.autograd.Function):
    """Returns a tensor unchanged and gives a parameter that it does not depend on a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, parameter: Tensor) -> Tensor:
        ctx.save_for_backward(parameter)
        # a view: autograd does not accept an input as the output of a function
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (parameter,) = ctx.saved_tensors
        return grads[0], torch.zeros_like(parameter)
