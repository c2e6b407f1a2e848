"""Helpers of the exporters of packed weights: a module's codes and scales, checked casts, and the dtype of the other tensors."""

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
    """A module's spec, codes and scales, one scale per row and group: w = (codes - zeros) * scales."""

    spec: QuantSpec
    codes: Tensor
    """[out, in]: int8 (kind int), float8 e4m3 (fp8_e4m3), or uint8 in 0..15."""
    scales: Tensor
    """fp32 [out, groups]."""
    zeros: Tensor | None
    """int8 [out, groups]; None if symmetric."""

    @property
    def group_size(self) -> int | None:
        """Input features per scale; None for one scale per row."""
        return None if isinstance(self.spec.group_size, str) else self.spec.group_size


def layer(source: ExportSource, module: str) -> Layer:
    """Return a module's layer. A scale of the whole matrix is repeated for each row, which gives the same weights."""
    state = source.state
    codes, scales, zeros = state.codes[module], state.scales[module], state.zero_points.get(module)
    if tuple(scales.shape) == (1, 1) and state.spec_of(module).group_size == "tensor":
        # a view: the one number is not copied
        scales = scales.expand(codes.shape[0], 1)
        zeros = None if zeros is None else zeros.expand(codes.shape[0], 1)
    return Layer(spec=state.spec_of(module), codes=codes, scales=scales, zeros=zeros)


def unsigned(codes: Tensor, bits: int) -> Tensor:
    """Shift signed codes to int32 in [0, 2^bits - 1].

    Raises:
        ValueError: a code is out of range; packed, it would overwrite its neighbours.
    """
    # u = q + 2^(b-1)
    moved = codes.to(torch.int32) + (1 << (bits - 1))
    if moved.numel() and not 0 <= int(moved.min()) <= int(moved.max()) < 1 << bits:
        raise ValueError(f"codes span {int(codes.min())}..{int(codes.max())}, which {bits} bits do not hold")
    return moved


def exact_scales(scales: Tensor, dtype: torch.dtype, format: str, module: str) -> Tensor:
    """Cast scales to another dtype; UserError if a value changes."""
    # law 3, docs/architecture.md: an exporter moves bits. A scale that changed here would give other weights than those that were trained
    stored = scales.to(dtype)
    if not torch.equal(stored.to(torch.float32), scales):
        raise UserError(
            f"{format} stores scales in {NAMES[dtype]}, which does not hold those of {module} exactly; "
            "quantize with scale_grid 'bf16_fp16', whose scales every format holds"
        )
    return stored.contiguous()


def exact_plain(source: ExportSource, name: str, dtype: torch.dtype) -> Tensor:
    """Return an unquantized tensor in a 16-bit float; UserError if a value changes."""
    tensor = source.tensor(name)
    if not holds(tensor, dtype):
        word = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, NAMES[dtype])
        raise UserError(
            f"{source.plain[name]}: {name} has values that {word} does not hold, so the export would not be the model that was "
            "measured; quantize the model again (the stages 'qat' and 'quantize' store such tensors on the bf16 grid)"
        )
    return tensor.to(dtype).contiguous()


def plain_dtype(source: ExportSource, preferred: Sequence[torch.dtype]) -> torch.dtype:
    """Return the first dtype that holds every unquantized tensor exactly, or the last one; writing then names the tensor it does not
    hold."""
    # the last one is taken without a look: where it holds nothing either, writing names the tensor
    for dtype in preferred[:-1]:
        if all(holds(source.tensor(name), dtype) for name in source.plain):
            return dtype
    return preferred[-1]


def unquantized_config(source: ExportSource, dtype: torch.dtype) -> dict[str, Any]:
    """Return the model's ``config.json`` with the stored dtype, without local paths and without references to code."""
    # _name_or_path is a path of this machine, auto_map names Python files that an export does not contain
    config = {key: value for key, value in source.config.items() if key not in ("torch_dtype", "_name_or_path", "auto_map")}
    return config | {"dtype": NAMES[dtype]}
