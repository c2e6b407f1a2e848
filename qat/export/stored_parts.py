"""The tensors that a packed format stores for one quantized matrix, from its shape and scheme alone.

The exporters plan their files with these rules, and the plan of a recipe its sizes. GGUF stores blocks instead; see ``gguf/blocks.py``.
"""

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..packed_width import packed_width

if TYPE_CHECKING:
    from ..spec import ActivationSpec, QuantSpec

StoredTensor = tuple[str, tuple[int, ...]]
"""(safetensors dtype, shape)."""
Parts = dict[str, StoredTensor]
"""Name below the module, such as ``weight_packed`` -> tensor, in the order of writing."""
WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "I32": 4, "I64": 8}
"""safetensors dtype -> bytes per element."""


def stored_bytes(tensor: StoredTensor) -> int:
    """Return the bytes of a tensor's data."""
    dtype, shape = tensor
    return WIDTHS[dtype] * math.prod(shape)


def compressed_tensors_parts(rows: int, columns: int, spec: "QuantSpec", activations: "ActivationSpec | None" = None) -> Parts:
    """Return the tensors of pack-quantized, or of int-quantized where inputs are rounded; of the formats of floats for such a scheme.

    Args:
        rows: Outputs.
        columns: Inputs.
        spec: Scheme of the codes.
        activations: How inputs are rounded.
    """
    # one scale for the matrix is stored for each row, so only the number of groups counts
    groups = spec.scale_shape(rows, columns)[1]
    if spec.kind != "int":
        return _float_parts(rows, columns, groups, spec.kind, activations)
    scale: Parts = {"weight_scale": ("BF16", (rows, groups))}
    if activations is None:
        # the shape of the unpacked matrix is stored, because the packed width does not give it; zero points are packed along the outputs
        packed: Parts = {"weight_packed": ("I32", (rows, packed_width(columns, spec.bits)))}
        zeros: Parts = {} if spec.symmetric else {"weight_zero_point": ("I32", (packed_width(rows, spec.bits), groups))}
        return {**packed, **scale, "weight_shape": ("I64", (2,)), **zeros}
    # int8 kernels read unpacked codes: one byte per code and zero point
    zeros = {} if spec.symmetric else {"weight_zero_point": ("I8", (rows, groups))}
    # dynamic scales are computed by the server, and nothing is stored for them
    static = activations.scaling == "static"
    inputs: Parts = {"input_scale": ("F32", (1,))} if static else {}
    inputs |= {"input_zero_point": ("I8", (1,))} if static and not activations.symmetric else {}
    return {"weight": ("I8", (rows, columns)), **scale, **zeros, **inputs}


def _float_parts(rows: int, columns: int, groups: int, kind: str, activations: "ActivationSpec | None") -> Parts:
    """Return the tensors of float-quantized, mxfp4-pack-quantized or nvfp4-pack-quantized."""
    # dynamic scales are computed by the server
    static = activations is not None and activations.scaling == "static"
    if kind == "fp8_e4m3":
        inputs: Parts = {"input_scale": ("F32", (1,))} if static else {}
        return {"weight": ("F8_E4M3", (rows, columns)), "weight_scale": ("BF16", (rows, groups)), **inputs}
    # two codes of 4 bits in a byte; the bytes of scales are e8m0 (mxfp4) or e4m3 (nvfp4)
    packed: Parts = {"weight_packed": ("U8", (rows, columns // 2))}
    if kind == "mxfp4":
        return {**packed, "weight_scale": ("U8", (rows, groups))}
    inputs = {"input_global_scale": ("F32", (1,))} if static else {}
    return {**packed, "weight_scale": ("F8_E4M3", (rows, groups)), "weight_global_scale": ("F32", (1,)), **inputs}


def gptq_parts(rows: int, columns: int, spec: "QuantSpec", activations: "ActivationSpec | None" = None) -> Parts:
    """Return the tensors of both versions of GPTQ; arguments as ``compressed_tensors_parts``. Inputs cannot be rounded."""
    groups = spec.scale_shape(rows, columns)[1]
    return {
        "qweight": ("I32", (packed_width(columns, spec.bits), rows)),
        # also for symmetric codes: every reader expects zero points
        "qzeros": ("I32", (groups, packed_width(rows, spec.bits))),
        "scales": ("F16", (groups, rows)),
        "g_idx": ("I32", (columns,)),
    }


def awq_parts(rows: int, columns: int, spec: "QuantSpec", activations: "ActivationSpec | None" = None) -> Parts:
    """Return the tensors of AWQ, whose codes have 4 bits; arguments as ``compressed_tensors_parts``. Inputs cannot be rounded."""
    groups = spec.scale_shape(rows, columns)[1]
    return {
        "qweight": ("I32", (columns, packed_width(rows, 4))),
        "qzeros": ("I32", (groups, packed_width(rows, 4))),
        "scales": ("F16", (groups, rows)),
    }


def bitsandbytes_parts(rows: int, columns: int, spec: "QuantSpec", activations: "ActivationSpec | None" = None) -> Parts:
    """Return the tensors of bitsandbytes, int8 or NF4; arguments as ``compressed_tensors_parts``. Nothing is stored for inputs."""
    if spec.kind == "int":
        return {"weight": ("I8", (rows, columns)), "SCB": ("F32", (rows,)), "weight_format": ("U8", ())}
    count = math.prod(spec.scale_shape(rows, columns))
    described = len(nf4_description(rows, columns, spec))
    return {
        # two codes per byte
        "weight": ("U8", (rows * columns // 2, 1)),
        "weight.absmax": ("F32", (count,)),
        "weight.quant_map": ("F32", (16,)),
        "weight.quant_state.bitsandbytes__nf4": ("U8", (described,)),
    }


def nf4_description(rows: int, columns: int, spec: "QuantSpec") -> bytes:
    """Return the JSON that bitsandbytes stores beside NF4 codes.

    Its ``dtype`` is that of the decoded weights: fp32 keeps table times absmax exact, and kernels round it to the dtype of the inputs.
    """
    return json.dumps({"quant_type": "nf4", "blocksize": spec.group_size, "dtype": "float32", "shape": [rows, columns]}).encode()


PARTS: dict[str, Callable[..., Parts]] = {
    "compressed-tensors": compressed_tensors_parts,
    "gptq": gptq_parts,
    "gptq_v2": gptq_parts,
    "awq": awq_parts,
    "bitsandbytes": bitsandbytes_parts,
}
"""Format -> its tensors for one matrix."""
