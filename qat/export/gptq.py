"""The GPTQ formats: "gptq" (version 1, symmetric) and "gptq_v2" (also asymmetric), read by vLLM, SGLang, GPTQModel and transformers.

Per module, with unsigned codes u = q + 2^(b-1) and zero points z in the same terms: ``qweight`` int32 [in b / 32, out] packed along the
inputs, ``qzeros`` int32 [groups, out b / 32] packed along the outputs, ``scales`` fp16 [groups, out], ``g_idx`` int32 [in].
w = (u - z) * s. Version 1 stores z - 1, field by field, and so has no z = 0: asymmetric weights go to version 2.

Source: GPTQModel ``nn_modules/qlinear/__init__.py``, ``quantization/config.py``; vLLM ``layers/quantization/gptq*.py``.
"""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.common.files import write_json_atomic
from ...models.fused_linears import FUSED, FUSED_NAMES
from ..packing import pack_bits
from ..source.quantized_source import ExportSource
from ..spec import QuantSpec
from .common import exact_plain, exact_scales, layer, plain_dtype, unquantized_config
from .shards import plan_shards, write_shards
from .stored_parts import gptq_parts, stored_bytes

V1, V2 = "gptq", "gptq_v2"
_DTYPES = (torch.float16, torch.bfloat16)


def quantization_config(source: ExportSource, format: str) -> dict[str, Any]:
    """Return the ``quantization_config`` of ``config.json``, which is also the content of ``quantize_config.json``."""
    state = source.state
    # the most frequent spec is the default; ``dynamic`` lists the modules that differ from it
    common = Counter(state.spec_of(module) for module in state.modules).most_common(1)[0][0]
    config: dict[str, Any] = {
        "quant_method": "gptq",
        **_settings(common),
        # decoct never permutes inputs, so groups are ranges of columns
        "desc_act": False,
        "lm_head": "lm_head" in state.modules,
        "checkpoint_format": format,
        "pack_dtype": "int32",
        "dynamic": _dynamic(source, common),
        "meta": {"quantizer": ["decoct"]},
    }
    # for readers that know no patterns (``dynamic``)
    blocks = _in_every_block(source)
    return config if blocks is None else config | {"modules_in_block_to_quantize": blocks}


def _settings(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": -1 if isinstance(spec.group_size, str) else spec.group_size, "sym": spec.symmetric}


def _dynamic(source: ExportSource, common: QuantSpec) -> dict[str, Any]:
    """Return patterns of modules that differ: '-:' is not quantized, '+:' has its own settings. Parts and servers' fused matrices are
    listed."""
    state, rules = source.state, {}
    # the head has a field of its own, ``lm_head``
    for module in (name for name in source.unquantized_linears if name != "lm_head"):
        rules |= {f"-:^{re.escape(name)}$": {} for name in _also_fused(module)}
    for module in state.modules:
        spec = state.spec_of(module)
        if spec != common:
            rules |= {f"+:^{re.escape(name)}$": _settings(spec) for name in _also_fused(module)}
    return rules


def _also_fused(module: str) -> list[str]:
    parent, _, name = module.rpartition(".")
    # servers look a pattern up under the name of the fused matrix, for example qkv_proj
    return [module, *(f"{parent}.{fused}" for fused, parts in zip(FUSED_NAMES, FUSED) if name in parts)]


def _in_every_block(source: ExportSource) -> list[list[str]] | None:
    """Return the quantized names inside a decoder layer, for readers without patterns; None if all are quantized or layers differ."""
    blocks: dict[str, set[str]] = {}
    quantized = set(source.state.modules)
    for name in source.structure.linears:
        found = re.match(r"(.*?\.\d+)\.(.+)", name)
        if found:
            blocks.setdefault(found[1], set())
            if name in quantized:
                blocks[found[1]].add(found[2])
    # one set of names for all layers is all that ``modules_in_block_to_quantize`` can express
    everywhere = {tuple(sorted(names)) for names in blocks.values()}
    if len(everywhere) != 1 or all(name in quantized for name in source.structure.linears if re.match(r".*?\.\d+\.", name)):
        return None
    return [[name] for name in sorted(everywhere.pop())]


def exported_config(source: ExportSource, format: str) -> dict[str, Any]:
    """Return the export's ``config.json``; its dtype is float16 if that holds every unquantized tensor exactly, else bfloat16."""
    config = unquantized_config(source, plain_dtype(source, _DTYPES))
    return config | {"quantization_config": quantization_config(source, format)}


def planned_bytes(source: ExportSource) -> int:
    """Bytes of tensor data that ``write`` will store."""
    return sum(_sizes(source).values())


def write(folder: Path, source: ExportSource, format: str) -> None:
    """Write the weight files and ``quantize_config.json`` into ``folder``.

    Raises:
        UserError: scales that fp16 does not hold, or an unquantized tensor with values that neither fp16 nor bf16 holds.
    """
    dtype = plain_dtype(source, _DTYPES)
    # older readers look here instead of into config.json
    write_json_atomic(folder / "quantize_config.json", quantization_config(source, format))
    write_shards(folder, plan_shards(_sizes(source)), lambda name: _stored(source, name, format, dtype))


def _sizes(source: ExportSource) -> dict[str, int]:
    """Return the bytes of every stored tensor, in the order of writing."""
    sizes: dict[str, int] = {}
    for module in source.state.modules:
        rows, columns = source.state.codes[module].shape
        parts = gptq_parts(rows, columns, source.state.spec_of(module))
        sizes |= {f"{module}.{part}": stored_bytes(tensor) for part, tensor in parts.items()}
    return sizes | {name: 2 * math.prod(source.structure.shapes[name]) for name in source.plain}


def _stored(source: ExportSource, name: str, format: str, dtype: torch.dtype) -> Tensor:
    """Return the tensor stored under ``name``."""
    if name in source.plain:
        return exact_plain(source, name, dtype)
    module, part = name.rsplit(".", 1)
    it = layer(source, module)
    columns, groups = it.codes.shape[1], it.scales.shape[1]
    if part == "qweight":
        # packed along the inputs: [out, words] -> [words, out]
        return pack_bits(it.codes, it.spec.bits).T.contiguous()
    if part == "qzeros":
        # signed 0 is 2^(b-1) in the unsigned terms of the format
        zeros = torch.zeros_like(it.scales, dtype=torch.int8) if it.zeros is None else it.zeros
        # version 1: subtract 1 from each field before packing; subtracting from a packed word would borrow across fields
        return pack_bits((zeros.T - (1 if format == V1 else 0)).contiguous(), it.spec.bits)
    if part == "scales":
        return exact_scales(it.scales, torch.float16, format, module).T.contiguous()
    # g_idx: the group of each input, in order because decoct does not permute inputs
    return torch.arange(columns, dtype=torch.int32) // (columns // groups)
