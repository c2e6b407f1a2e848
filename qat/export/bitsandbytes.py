"""The formats of bitsandbytes, which transformers and vLLM read: int8 with one scale per row (LLM.int8), and NF4 in blocks along a row.

int8: ``weight`` int8 [out, in] and ``SCB`` fp32 [out], w = q * SCB / 127; inputs are rounded to int8 per token, and values of at least
``llm_int8_threshold`` stay in 16 bits. NF4: ``weight`` uint8 [out * in / 2, 1], two indices per byte, the first in the high bits, with
``weight.absmax`` fp32 [blocks], the table in ``weight.quant_map`` and a description in JSON; w = table[index] * absmax.

Source: bitsandbytes ``nn/modules.py`` (Linear8bitLt, Params4bit), ``functional.py`` (QuantState.as_dict, int8_vectorwise_quant);
transformers ``quantizers/quantizer_bnb_8bit.py``, ``quantizer_bnb_4bit.py``.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.common.errors import UserError
from ..fake_quant.float_reference import NF4
from ..source.quantized_source import ExportSource
from ..spec import QuantSpec
from .common import NAMES, exact_plain, layer, plain_dtype, unquantized_config
from .shards import plan_shards, write_shards
from .stored_parts import bitsandbytes_parts, nf4_description, stored_bytes

NAME = "bitsandbytes"
_DTYPES = (torch.bfloat16, torch.float16)
_ROW_MAJOR = 0
"""``weight_format`` of codes in the order of the matrix; the others are layouts of old GPUs."""


def pack_pairs(codes: Tensor) -> Tensor:
    """Pack 4-bit codes, uint8 [out, in] in 0..15, two to a byte: uint8 [out * in / 2, 1], the first in the high bits."""
    pairs = codes.reshape(-1, 2)
    return ((pairs[:, 0] << 4) | pairs[:, 1])[:, None].contiguous()


def quantization_config(source: ExportSource, dtype: torch.dtype) -> dict[str, Any]:
    """Return the ``quantization_config`` of ``config.json``."""
    common = {"quant_method": NAME, "llm_int8_skip_modules": source.unquantized_linears}
    if _is_nf4(source):
        four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "uint8"}
        return {**common, "load_in_4bit": True, "load_in_8bit": False, **four, "bnb_4bit_compute_dtype": NAMES[dtype]}
    inputs = source.state.activations
    # 0 rounds every input
    threshold = (inputs.outliers if inputs is not None else None) or 0.0
    return {**common, "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": threshold, "llm_int8_has_fp16_weight": False}


def exported_config(source: ExportSource) -> dict[str, Any]:
    """Return the export's ``config.json``."""
    dtype = plain_dtype(source, _DTYPES)
    return unquantized_config(source, dtype) | {"quantization_config": quantization_config(source, dtype)}


def check_values(source: ExportSource) -> None:
    """Refuse scales of int8 rows that fp32 does not hold times 127; UserError names the module."""
    for module in [] if _is_nf4(source) else source.state.modules:
        scales = layer(source, module).scales
        # divided in fp64, as torch multiplies fp32 by a rounded 1 / 127
        if not torch.equal((_stored_absmax(scales).double() / 127).float(), scales.reshape(-1)):
            raise UserError(
                f"{NAME} stores 127 times the scale in fp32, which does not hold those of {module} exactly; quantize with scale_grid "
                "'bf16_fp16', whose scales every format holds"
            )


def planned_bytes(source: ExportSource) -> int:
    """Bytes of tensor data that ``write`` will store."""
    return sum(size for size, _, _ in _sizes(source).values())


def write(folder: Path, source: ExportSource) -> None:
    """Write the weight files into ``folder``.

    Raises:
        UserError: an unquantized tensor has values that neither fp16 nor bf16 holds.
    """
    dtype, stored = plain_dtype(source, _DTYPES), _sizes(source)
    sizes = {name: size for name, (size, _, _) in stored.items()}
    write_shards(folder, plan_shards(sizes), lambda name: _tensor(source, name, *stored[name][1:], dtype))


def _is_nf4(source: ExportSource) -> bool:
    # the limits let one scheme through for all modules
    return source.state.spec_of(source.state.modules[0]).kind == "nf4"


def _stored_absmax(scales: Tensor) -> Tensor:
    return scales.reshape(-1) * 127


def _sizes(source: ExportSource) -> dict[str, tuple[int, str, str]]:
    """Return (bytes, module, part) of every stored tensor, in the order of writing; plain tensors have no module."""
    sizes: dict[str, tuple[int, str, str]] = {}
    for module in source.state.modules:
        rows, columns = source.state.codes[module].shape
        parts = bitsandbytes_parts(rows, columns, source.state.spec_of(module))
        sizes |= {f"{module}.{part}": (stored_bytes(tensor), module, part) for part, tensor in parts.items()}
    return sizes | {name: (2 * math.prod(source.structure.shapes[name]), "", "") for name in source.plain}


def _tensor(source: ExportSource, name: str, module: str, part: str, dtype: torch.dtype) -> Tensor:
    """Return the tensor stored under ``name``."""
    if not module:
        return exact_plain(source, name, dtype)
    it, spec = layer(source, module), source.state.spec_of(module)
    if part == "weight":
        return pack_pairs(it.codes) if spec.kind == "nf4" else it.codes.contiguous()
    if part == "weight.absmax":
        return it.scales.reshape(-1).contiguous()
    if part == "weight.quant_map":
        return torch.tensor(NF4)
    if part == "weight_format":
        return torch.tensor(_ROW_MAJOR, dtype=torch.uint8)
    if part == "SCB":
        return _stored_absmax(it.scales)
    return _description(spec, it.codes)


def _description(spec: QuantSpec, codes: Tensor) -> Tensor:
    rows, columns = codes.shape
    return torch.frombuffer(bytearray(nf4_description(rows, columns, spec)), dtype=torch.uint8)
