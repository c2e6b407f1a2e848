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


def _group(spec: QuantSpec, inputs: ActivationSpec | None, targets: list[str]) -> dict[str, Any]:
    group_size = None if isinstance(spec.group_size, str) else spec.group_size
    weights = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
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
        "format": PACK_QUANTIZED if inputs is None else INT_QUANTIZED,
    }


def _inputs(inputs: ActivationSpec) -> dict[str, Any]:
    dynamic = inputs.scaling == "dynamic"
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": inputs.symmetric,
        "strategy": "token" if dynamic else "tensor",
        "group_size": None,
        "block_structure": None,
        "dynamic": dynamic,
        "actorder": None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
    }
