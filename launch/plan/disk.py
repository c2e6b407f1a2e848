"""Bytes on disk, predicted from names, shapes and dtypes: model folders, exports, checkpoints."""

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...qat.export.gguf.blocks import is_q2_0, symmetric_bits
from .shapes import ModelShape, quantized_linears

if TYPE_CHECKING:
    from ...qat.scheme import QuantScheme
    from ...qat.spec import QuantSpec

_WIDTHS = {"F32": 4, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "I32": 4, "I64": 8}
_OPTIMIZER_TENSORS = 2  # both moments, fp32, whatever the optimizer keeps in memory

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""name -> (safetensors dtype, shape)."""


def safetensors_bytes(tensors: Tensors) -> int:
    """Return the size of a safetensors file: header length, header (JSON, padded to 8 bytes), data."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = _WIDTHS[dtype]
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = len(json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + offset


def model_bytes(shape: ModelShape, dtype: str) -> int:
    """Return the bytes of a model folder's weight files with all tensors in ``dtype`` (BF16, F32)."""
    return safetensors_bytes({name: (dtype, sizes) for name, sizes in shape.tensors.items()})


def quantized_bytes(shape: ModelShape, scheme: "QuantScheme") -> tuple[int, int]:
    """Return the bytes of (model.safetensors, quant/codes.safetensors) of a quantized folder: codes times scales in fp32, and int8 codes
    with fp32 scales."""
    codes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (rows, columns, spec) in quantized_linears(shape, scheme).items():
        scales = spec.scale_shape(rows, columns)
        codes[f"{name}.codes"] = ({"int": "I8", "fp8_e4m3": "F8_E4M3"}.get(spec.kind, "U8"), (rows, columns))
        codes[f"{name}.scale"] = ("F32", scales)
        if not spec.symmetric:
            codes[f"{name}.zero_point"] = ("I8", scales)
        if spec.kind == "nvfp4":
            codes[f"{name}.global_scale"] = ("F32", (1,))
    return model_bytes(shape, "F32"), safetensors_bytes(codes)


def compressed_tensors_bytes(shape: ModelShape, scheme: "QuantScheme") -> int:
    """Return the bytes of a compressed-tensors export: int32 words of codes, bf16 scales, everything else bf16."""
    quantized = quantized_linears(shape, scheme)
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (rows, columns, spec) in quantized.items():
        words = -(-columns * spec.bits // 32)
        stored[f"{name}.weight_packed"] = ("I32", (rows, words))
        groups = spec.scale_shape(rows, columns)[1]
        stored[f"{name}.weight_scale"] = ("BF16", (rows, groups))
        if not spec.symmetric:
            stored[f"{name}.weight_zero_point"] = ("I32", (-(-rows * spec.bits // 32), groups))
        stored[f"{name}.weight_shape"] = ("I64", (2,))
    return safetensors_bytes(stored | _unquantized(shape, scheme))


def gguf_bytes(shape: ModelShape, scheme: "QuantScheme") -> int:
    """Return the bytes of a GGUF export: blocks of 32 codes with an fp16 scale, other matrices bf16, vectors fp32, about 40 bytes per
    token."""
    return _gguf_bytes(shape, scheme, q2_0=False)


def gguf_q2_0_bytes(shape: ModelShape, scheme: "QuantScheme") -> int:
    """As ``gguf_bytes``, with symmetric 2-bit codes in blocks of 64 if rows and groups are multiples of 64."""
    return _gguf_bytes(shape, scheme, q2_0=True)


def _gguf_bytes(shape: ModelShape, scheme: "QuantScheme", *, q2_0: bool) -> int:
    quantized = quantized_linears(shape, scheme)
    total = 40 * shape.vocabulary
    for name, sizes in shape.tensors.items():
        elements = math.prod(sizes)
        packed = quantized.get(name.removesuffix(".weight"))
        narrow = packed is not None and q2_0 and is_q2_0(packed.spec, packed.columns)
        total += 64 + (elements // 32 * _block(packed.spec, narrow) if packed else elements * (4 if len(sizes) == 1 else 2))
    return total


def _block(spec: "QuantSpec", q2_0: bool) -> int:
    """Return the bytes per 32 codes. With zero points: Q4_1 up to 3 bits, Q5_1 above, since 4 bits only sometimes fit Q4_1."""
    if not spec.symmetric:
        return 20 if spec.bits <= 3 else 24
    return 9 if q2_0 else {4: 18, 5: 22, 8: 34}[symmetric_bits(spec.bits)]


def gptq_bytes(shape: ModelShape, scheme: "QuantScheme") -> int:
    """Return the bytes of a GPTQ export: int32 words of codes and zero points, fp16 scales, an int32 per column, everything else 16
    bits."""
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (rows, columns, spec) in quantized_linears(shape, scheme).items():
        groups = spec.scale_shape(rows, columns)[1]
        stored[f"{name}.qweight"] = ("I32", (-(-columns * spec.bits // 32), rows))
        stored[f"{name}.qzeros"] = ("I32", (groups, -(-rows * spec.bits // 32)))
        stored[f"{name}.scales"] = ("BF16", (groups, rows))
        stored[f"{name}.g_idx"] = ("I32", (columns,))
    return safetensors_bytes(stored | _unquantized(shape, scheme))


def awq_bytes(shape: ModelShape, scheme: "QuantScheme") -> int:
    """Return the bytes of an AWQ export: int32 words of codes and zero points, fp16 scales, everything else 16 bits."""
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (rows, columns, spec) in quantized_linears(shape, scheme).items():
        groups = spec.scale_shape(rows, columns)[1]
        stored[f"{name}.qweight"] = ("I32", (columns, -(-rows // 8)))
        stored[f"{name}.qzeros"] = ("I32", (groups, -(-rows // 8)))
        stored[f"{name}.scales"] = ("BF16", (groups, rows))
    return safetensors_bytes(stored | _unquantized(shape, scheme))


def plain_bytes(shape: ModelShape, scheme: "QuantScheme") -> int:
    """Return the bytes of a plain export with everything in 16 bits."""
    return model_bytes(shape, "BF16")


def plain_f32_bytes(shape: ModelShape, scheme: "QuantScheme") -> int:
    """Return the bytes of a plain export in fp32."""
    return model_bytes(shape, "F32")


def _unquantized(shape: ModelShape, scheme: "QuantScheme") -> dict[str, tuple[str, tuple[int, ...]]]:
    quantized = quantized_linears(shape, scheme)
    return {name: ("BF16", sizes) for name, sizes in shape.tensors.items() if name.removesuffix(".weight") not in quantized}


EXPORT_BYTES = {
    "compressed-tensors": compressed_tensors_bytes,
    "gguf": gguf_bytes,
    "gguf-q2_0": gguf_q2_0_bytes,
    "gptq": gptq_bytes,
    "gptq_v2": gptq_bytes,
    "awq": awq_bytes,
    "safetensors": plain_bytes,
    "safetensors-f32": plain_f32_bytes,
}
"""Format -> function of (shape, specs)."""


def checkpoint_bytes(shape: ModelShape, *, masks: bool) -> int:
    """Return the bytes of one checkpoint of a training stage: fp32 weights and moments, and one byte per weight for masks."""
    return 4 * shape.parameters * (1 + _OPTIMIZER_TENSORS) + (shape.linear if masks else 0)
