"""Bytes on disk, predicted from names, shapes and dtypes: model folders, quantized folders, checkpoints."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...qat.export.stored_parts import StoredTensor, stored_bytes
from .quantized_shapes import quantized_linears
from .shapes import ModelShape

if TYPE_CHECKING:
    from ...qat.scheme import QuantScheme
    from ...qat.spec import QuantSpec

_OPTIMIZER_TENSORS = 2  # both moments, fp32, whatever the optimizer keeps in memory

Tensors = Mapping[str, StoredTensor]
"""Name -> (safetensors dtype, shape)."""


def safetensors_bytes(tensors: Tensors) -> int:
    """Return the size of a safetensors file: header length, header (JSON, padded to 8 bytes), data."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        # offsets are part of the header's text, so their digits count too
        size = stored_bytes((dtype, shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    # compact JSON, as the library writes it
    text = len(json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")))
    # 8 bytes hold the length of the header, which is padded with spaces
    return 8 + -(-text // 8) * 8 + offset


def model_bytes(shape: ModelShape, dtype: str) -> int:
    """Return the bytes of a model folder's weight files with all tensors in ``dtype`` (BF16, F32)."""
    return safetensors_bytes({name: (dtype, sizes) for name, sizes in shape.tensors.items()})


def quantized_bytes(shape: ModelShape, scheme: "QuantScheme") -> tuple[int, int]:
    """Return the bytes of (model.safetensors, quant/codes.safetensors) of a quantized folder: codes times scales in fp32, and int8 codes
    with fp32 scales."""
    codes: dict[str, StoredTensor] = {}
    for name, (rows, columns, spec) in quantized_linears(shape, scheme).items():
        scales = spec.scale_shape(rows, columns)
        codes[f"{name}.codes"] = (_code_dtype(spec), (rows, columns))
        codes[f"{name}.scale"] = ("F32", scales)
        # a zero point for each scale
        if not spec.symmetric:
            codes[f"{name}.zero_point"] = ("I8", scales)
        # nvfp4 has an fp32 scale for the whole matrix above its scales per group
        if spec.kind == "nvfp4":
            codes[f"{name}.global_scale"] = ("F32", (1,))
        if form := spec.super_block:
            codes[f"{name}.sub_scale"] = ("I8", (rows, columns // form.width))
            minimums: Tensors = {f"{name}.minimum_scale": ("F32", scales), f"{name}.sub_minimum": ("I8", (rows, columns // form.width))}
            codes |= minimums if form.minimum else {}
    return model_bytes(shape, "F32"), safetensors_bytes(codes)


def _code_dtype(spec: "QuantSpec") -> str:
    signed = spec.kind == "int" or spec.super_block is not None
    return "F8_E4M3" if spec.kind == "fp8_e4m3" else "I8" if signed else "U8"


def checkpoint_bytes(shape: ModelShape, *, masks: bool, scored: bool = False) -> int:
    """Return the bytes of one checkpoint of a training stage: fp32 weights and moments, one byte per weight for masks, and movement
    scores with the weights that they prune, fp32 too."""
    return 4 * shape.parameters * (1 + _OPTIMIZER_TENSORS) + shape.linear * (masks + 8 * scored)
