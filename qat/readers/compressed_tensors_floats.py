"""Independent reader of compressed-tensors modules with floats: fp8, mxfp4 and nvfp4. ``compressed_tensors.py`` opens the folder.

    float-quantized         P.weight F8_E4M3 [out, in]; P.weight_scale [out, 1], or [1] for the matrix
    mxfp4-pack-quantized    P.weight_packed U8 [out, in / 2]; P.weight_scale U8 [out, in / 32]: 2^(byte - 127)
    nvfp4-pack-quantized    P.weight_packed as above; P.weight_scale F8_E4M3 [out, in / 16]; P.weight_global_scale [1], which divides

Other tools also write fp8 under the name "naive-quantized". A byte of weight_packed has the even input in its lower four bits.

Source: compressed-tensors ``compressors/naive_quantized/base.py``, ``compressors/nvfp4``, ``compressors/mxfp4``; OCP 8-bit Floating Point
Specification, section 5 (e4m3); OCP Microscaling Formats v1.0, section 5 (e2m1, e8m0).
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.common.errors import UserError
from .fields import check_fields
from .tensors import StoredFloats, StoredScheme, StoredTensors

FLOAT_FORMATS = {
    "float-quantized": "fp8_e4m3",
    "naive-quantized": "fp8_e4m3",
    "mxfp4-pack-quantized": "mxfp4",
    "nvfp4-pack-quantized": "nvfp4",
}
"""Name of a layout -> kind of its codes."""
GLOBAL, INPUT_GLOBAL = ".weight_global_scale", ".input_global_scale"
_GROUPS = {"mxfp4": 32, "nvfp4": 16}
_STRATEGIES = {"fp8_e4m3": ("channel", "tensor"), "mxfp4": ("group",), "nvfp4": ("tensor_group",)}
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _e4m3_values() -> NDArray[np.float32]:
    """The number of each byte: sign, 4 bits of exponent with bias 7, 3 of mantissa; the last exponent with all mantissa bits is NaN."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, (byte & 7).astype(np.float32)
    # exponent 0: no leading one, and the spacing of exponent 1
    size = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    size[(byte & 127) == 127] = np.nan
    return np.where(byte & 128, -size, size).astype(np.float32)


_E4M3 = _e4m3_values()
_E2M1 = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)


def read_float_weights(file: Path, form: str, weights: dict[str, Any]) -> StoredScheme:
    """The scheme of a group with floats; UserError for a field that this reader does not know."""
    kind = FLOAT_FORMATS[form]
    group = _GROUPS.get(kind)
    check_fields(
        file,
        [
            ("weights.num_bits", weights.get("num_bits"), (8 if kind == "fp8_e4m3" else 4,)),
            ("weights.type", weights.get("type"), ("float",)),
            ("weights.symmetric", weights.get("symmetric", True), (True,)),
            ("weights.strategy", weights.get("strategy"), _STRATEGIES[kind]),
            ("weights.dynamic", weights.get("dynamic", False), (False,)),
            ("weights.actorder", weights.get("actorder"), (None, "static", "weight")),
            # by channel and by tensor a group size is not used
            *([] if group is None else [("weights.group_size", weights.get("group_size"), (group,))]),
        ],
    )
    return StoredScheme(bits=8 if kind == "fp8_e4m3" else 4, group_size=group, kind=kind)


def read_floats(stored: StoredTensors, module: str, kind: str) -> StoredFloats:
    """Codes and scales of a module; UserError if shapes or dtypes do not fit, or a code or scale is no number that it can be."""
    rows, columns = float_shape(stored, module, kind)
    if kind == "fp8_e4m3":
        codes = stored.integers(f"{module}.weight")
        values = _E4M3[codes]
        if np.isnan(values).any():
            raise UserError(f"{stored.file(f'{module}.weight')}: {module}.weight holds NaN codes; export again")
        scales = _row_scales(stored, f"{module}.weight_scale", rows)
    else:
        pairs = stored.integers(f"{module}.weight_packed")
        # [out, in / 2] -> [out, in / 2, 2] -> [out, in], the lower half first
        codes = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(rows, columns)
        values = _E2M1[codes]
        scales = _byte_scales(stored, f"{module}.weight_scale", (rows, columns // _GROUPS[kind]), kind)
    whole = stored.scales(module + GLOBAL, (1,))[0] if kind == "nvfp4" else None
    zeros = np.zeros(scales.shape, np.int16)
    return StoredFloats(codes=codes.astype(np.int16), scales=scales, zeros=zeros, values=values, whole=whole)


def float_shape(stored: StoredTensors, module: str, kind: str) -> tuple[int, int]:
    """(out, in) of a module, from its codes; UserError if they are not a matrix that groups of the kind divide."""
    name, dtype, each = (f"{module}.weight", "F8_E4M3", 1) if kind == "fp8_e4m3" else (f"{module}.weight_packed", "U8", 2)
    shape = stored.shape(name)
    if stored.dtype(name) != dtype or len(shape) != 2 or 0 in shape:
        raise UserError(f"{stored.file(name)}: {name} is {stored.dtype(name)} of shape {shape}, not a matrix of {dtype}; export again")
    if shape[1] * each % _GROUPS.get(kind, 1):
        raise UserError(f"{stored.file(name)}: {name} has {shape[1] * each} columns, which groups of {_GROUPS[kind]} do not divide")
    return shape[0], shape[1] * each


def _row_scales(stored: StoredTensors, name: str, rows: int) -> NDArray[np.float32]:
    """fp32 [out, 1]; one scale of the matrix is repeated."""
    if stored.shape(name) in ((), (1,)):
        return np.repeat(stored.scales(name, stored.shape(name)).reshape(1, 1), rows, axis=0)
    return stored.scales(name, (rows, 1))


def _byte_scales(stored: StoredTensors, name: str, shape: tuple[int, int], kind: str) -> NDArray[np.float32]:
    stored.expect(name, ("U8" if kind == "mxfp4" else "F8_E4M3",), shape)
    data = stored.integers(name)
    # e8m0 has no sign and no zero; its last byte is NaN
    values = (
        np.where(data == 255, np.nan, np.ldexp(1.0, data.astype(np.int32) - 127)).astype(np.float32) if kind == "mxfp4" else _E4M3[data]
    )
    if not (values > 0).all():
        raise UserError(f"{stored.file(name)}: {name} holds a scale that is not finite and positive; export again")
    return values
