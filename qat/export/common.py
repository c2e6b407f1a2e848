"""What the exporters of packed weights share: the spec of a module, checked casts, and which 16-bit float the rest is stored in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.common.errors import UserError
from ..source.plain_weights import holds
from ..source.quantized_source import ExportSource
from ..spec import QuantSpec

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A module's spec with a scale for each row and group: w = (codes - zeros) * scales."""

    spec: QuantSpec
    codes: Tensor
    """int8 [out, in]."""
    scales: Tensor
    """fp32 [out, groups]."""
    zeros: Tensor | None
    """int8 [out, groups]; None when symmetric."""

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale; None: the whole row."""
        return None if isinstance(self.spec.group_size, str) else self.spec.group_size


def layer(source: ExportSource, module: str) -> Layer:
    """The spec of a module; one scale for the whole matrix is repeated for each row, which is the same numbers."""
    state = source.state
    codes, scales, zeros = state.codes[module], state.scales[module], state.zero_points.get(module)
    if tuple(scales.shape) == (1, 1) and state.spec_of(module).group_size == "tensor":
        scales = scales.expand(codes.shape[0], 1)
        zeros = None if zeros is None else zeros.expand(codes.shape[0], 1)
    return Layer(spec=state.spec_of(module), codes=codes, scales=scales, zeros=zeros)


def unsigned(codes: Tensor, bits: int) -> Tensor:
    """Signed codes as int32 in [0, 2^bits - 1]; ValueError for one out of range, which would spill into its neighbours."""
    moved = codes.to(torch.int32) + (1 << (bits - 1))
    if moved.numel() and not 0 <= int(moved.min()) <= int(moved.max()) < 1 << bits:
        raise ValueError(f"codes span {int(codes.min())}..{int(codes.max())}, which {bits} bits do not hold")
    return moved


def exact_scales(scales: Tensor, dtype: torch.dtype, format: str, module: str) -> Tensor:
    """Scales in another dtype; UserError unless every one stays what it is."""
    stored = scales.to(dtype)
    if not torch.equal(stored.to(torch.float32), scales):
        raise UserError(
            f"{format} stores scales in {NAMES[dtype]}, which does not hold those of {module} exactly; "
            "quantize with scale_grid 'bf16_fp16', whose scales every format holds"
        )
    return stored.contiguous()


def exact_plain(source: ExportSource, name: str, dtype: torch.dtype) -> Tensor:
    """An unquantized tensor in a 16-bit float; UserError unless every value stays what it is."""
    tensor = source.tensor(name)
    if not holds(tensor, dtype):
        word = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, NAMES[dtype])
        raise UserError(
            f"{source.plain[name]}: {name} has values that {word} does not hold, so the export would not be the model that was "
            "measured; quantize the model again (the stages 'qat' and 'quantize' store such tensors on the bf16 grid)"
        )
    return tensor.to(dtype).contiguous()


def plain_dtype(source: ExportSource, preferred: Sequence[torch.dtype]) -> torch.dtype:
    """The first of the dtypes that holds every unquantized tensor exactly; the last when none does (writing then says which)."""
    for dtype in preferred[:-1]:
        if all(holds(source.tensor(name), dtype) for name in source.plain):
            return dtype
    return preferred[-1]


def unquantized_config(source: ExportSource, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` of the model without anything of this machine in it, no code, and with the dtype that is stored."""
    config = {key: value for key, value in source.config.items() if key not in ("torch_dtype", "_name_or_path", "auto_map")}
    return config | {"dtype": NAMES[dtype]}
