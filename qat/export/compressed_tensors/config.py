"""The ``quantization_config`` of compressed-tensors exports: one group per spec.

A single group targets the class Linear. Several groups name their modules, because servers look for the class of a fused matrix before they
look at the names of its parts. Readers refuse unknown keys, so decoct adds none of its own.

Source: compressed-tensors ``quantization/quant_config.py``, ``quantization/quant_args.py``; vLLM ``compressed_tensors/utils.py``.
"""

from typing import Any

from ...source.quantized_source import ExportSource
from ...spec import ActivationSpec, QuantSpec
from .kv_cache import cache_scheme

NAME = "compressed-tensors"
LAYOUT_VERSION = "0.15.0"
"""The oldest package version that transformers 5 loads; 2, 4 and 8-bit layouts have not changed since."""
PACK_QUANTIZED, INT_QUANTIZED = "pack-quantized", "int-quantized"
FLOAT_FORMATS = {"fp8_e4m3": "float-quantized", "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}
"""Kind of the codes -> the package's name for their layout, with and without rounded inputs."""


def quantization_config(source: ExportSource) -> dict[str, Any]:
    """Return the ``quantization_config`` of ``config.json``."""
    state = source.state
    scheme: dict[QuantSpec, list[str]] = {}
    for module in state.modules:
        # specs that differ only in how their scales were found share a group
        scheme.setdefault(state.spec_of(module).as_stored(), []).append(module)
    # a single scheme holds for all linears but those of ``ignore``
    targets = {spec: source.also_in_model(modules) if len(scheme) > 1 else ["Linear"] for spec, modules in scheme.items()}
    groups = [_group(spec, source.state.activations, targets[spec]) for spec in scheme]
    formats = {group["format"] for group in groups}
    return {
        "quant_method": NAME,
        # 3, 5, 6 and 7 bits need the version that the user names; 2, 4 and 8 bits are laid out alike in all
        "version": source.reader_version or LAYOUT_VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": cache_scheme(source),
        # servers name some modules differently from the weight files: both names are listed
        "ignore": source.also_in_model(source.unquantized_linears),
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
    }


def format_of(spec: QuantSpec, inputs: ActivationSpec | None) -> str:
    """Return the package's name for the layout of a module with this scheme."""
    return FLOAT_FORMATS.get(spec.kind) or (PACK_QUANTIZED if inputs is None else INT_QUANTIZED)


def _group(spec: QuantSpec, inputs: ActivationSpec | None, targets: list[str]) -> dict[str, Any]:
    group_size = None if isinstance(spec.group_size, str) else spec.group_size
    weights = {
        **_numbers(spec.kind, spec.bits, group_size),
        "symmetric": spec.symmetric,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None if inputs is None else _inputs(inputs),
        "output_activations": None,
        # named in each group: readers would otherwise infer it from weights and inputs
        "format": format_of(spec, inputs),
    }


def _numbers(kind: str, bits: int, group_size: int | None) -> dict[str, Any]:
    """Return the fields of codes and scales: of weights, or of inputs in blocks."""
    strategy = "channel" if group_size is None else "group"
    stored = {"num_bits": bits, "type": "int" if kind == "int" else "float", "strategy": strategy, "group_size": group_size}
    # the dtype of scales tells the package that they are rounded to it, and mxfp4 apart from other floats in groups
    if kind == "nvfp4":
        return stored | {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    return stored | ({"scale_dtype": "torch.uint8"} if kind == "mxfp4" else {})


def _inputs(inputs: ActivationSpec) -> dict[str, Any]:
    dynamic: bool | str = inputs.scaling == "dynamic"
    if isinstance(group := inputs.matrix_spec.group_size, int):
        # local: scales of groups are computed, under a stored global one
        numbers, dynamic = _numbers(inputs.kind, 4, group), dynamic or "local"
    else:
        numbers = {"num_bits": 8, "type": "int" if inputs.kind == "int8" else "float", "strategy": "token" if dynamic else "tensor"}
        numbers["group_size"] = None
    return {
        **numbers,
        "symmetric": inputs.symmetric,
        "block_structure": None,
        "dynamic": dynamic,
        "actorder": None,
        "observer": None if dynamic is True else "minmax",
        "observer_kwargs": {},
    }
