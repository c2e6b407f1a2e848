"""The AWQ format, version "gemm": 4-bit codes packed along the outputs in an interleaved order, read by vLLM, SGLang and transformers.

Per module, with unsigned codes u = q + 8 and zero points z in the same terms: ``qweight`` int32 [in, out / 8], ``qzeros`` int32
[groups, out / 8] (z itself, packed alike; constant 8 for symmetric weights), ``scales`` fp16 [groups, out]. w = (u - z) * s.

Source: AutoAWQ ``modules/linear/gemm.py``, ``utils/packing_utils.py``; vLLM ``layers/quantization/awq*.py``.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..source.quantized_source import ExportSource
from .common import exact_plain, exact_scales, layer, plain_dtype, unquantized_config, unsigned
from .shards import plan_shards, write_shards
from .stored_parts import awq_parts, stored_bytes

NAME = "awq"
COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Index, among eight neighbouring outputs, of the one in each 4-bit field of a word, lowest field first."""
_DTYPES = (torch.float16, torch.bfloat16)


def pack_columns(codes: Tensor) -> Tensor:
    """Pack signed 4-bit codes along the last axis, eight to a word in the format's order.

    Args:
        codes: int8 [rows, out], values in [-8, 7]; out a multiple of 8.

    Returns:
        int32 [rows, out / 8].

    Raises:
        ValueError: another width, or a code out of range.
    """
    rows, width = codes.shape
    if width % 8:
        raise ValueError(f"{width} codes a row are no multiple of 8")
    # [rows, out / 8, 8]: eight neighbouring outputs share a word
    blocks = unsigned(codes, 4).view(rows, width // 8, 8)
    words = torch.zeros(rows, width // 8, dtype=torch.int32, device=codes.device)
    for place, column in enumerate(COLUMNS):
        # the top field may set the sign bit: the word is the same 32 bits, only read as a negative number
        words |= blocks[:, :, column] << (4 * place)
    return words


def quantization_config(source: ExportSource) -> dict[str, Any]:
    """Return the ``quantization_config`` of ``config.json``."""
    first = source.state.modules[0]
    return {
        "quant_method": NAME,
        "bits": 4,
        # the limits let one group size through, so any module has it; -1 is one scale per row
        "group_size": layer(source, first).group_size or -1,
        # the format always stores zero points; symmetric weights get the constant 8
        "zero_point": True,
        "version": "gemm",
        # readers skip lm_head without being configured to
        "modules_to_not_convert": [name for name in source.unquantized_linears if name != "lm_head"] or None,
    }


def exported_config(source: ExportSource) -> dict[str, Any]:
    """Return the export's ``config.json``; its dtype is float16 if that holds every unquantized tensor exactly, else bfloat16."""
    return unquantized_config(source, plain_dtype(source, _DTYPES)) | {"quantization_config": quantization_config(source)}


def planned_bytes(source: ExportSource) -> int:
    """Bytes of tensor data that ``write`` will store."""
    return sum(_sizes(source).values())


def write(folder: Path, source: ExportSource) -> None:
    """Write the weight files into ``folder``.

    Raises:
        UserError: scales that fp16 does not hold, or an unquantized tensor with values that neither fp16 nor bf16 holds.
    """
    dtype = plain_dtype(source, _DTYPES)
    write_shards(folder, plan_shards(_sizes(source)), lambda name: _stored(source, name, dtype))


def _sizes(source: ExportSource) -> dict[str, int]:
    """Return the bytes of every stored tensor, in the order of writing."""
    sizes: dict[str, int] = {}
    for module in source.state.modules:
        rows, columns = source.state.codes[module].shape
        parts = awq_parts(rows, columns, source.state.spec_of(module))
        sizes |= {f"{module}.{part}": stored_bytes(tensor) for part, tensor in parts.items()}
    return sizes | {name: 2 * math.prod(source.structure.shapes[name]) for name in source.plain}


def _stored(source: ExportSource, name: str, dtype: torch.dtype) -> Tensor:
    """Return the tensor stored under ``name``."""
    if name in source.plain:
        return exact_plain(source, name, dtype)
    module, part = name.rsplit(".", 1)
    it = layer(source, module)
    if part == "qweight":
        # [out, in] -> [in, out] -> [in, out / 8]
        return pack_columns(it.codes.T)
    if part == "qzeros":
        # a signed zero point of 0 is 8 in the unsigned terms of the format
        return pack_columns(torch.zeros_like(it.scales, dtype=torch.int8).T if it.zeros is None else it.zeros.T)
    return exact_scales(it.scales, torch.float16, NAME, module).T.contiguous()
