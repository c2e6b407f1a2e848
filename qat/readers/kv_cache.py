"""Independent reader of the quantization of keys and values in a compressed-tensors export: its scheme and stored scales.

    P.k_scale, P.v_scale    [1] float, P an attention module; x is rounded to e4m3(x / s) * s

Source: compressed-tensors ``quantization/quant_config.py`` (``kv_cache_scheme``).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...models.common.errors import UserError
from .fields import check_fields
from .tensors import StoredTensors

_SUFFIXES = (".k_scale", ".v_scale")


def read_cache_scheme(file: Path, scheme: Any) -> bool:
    """Whether keys and values are quantized; UserError if not to fp8 with one stored scale per tensor."""
    if scheme is None:
        return False
    if not isinstance(scheme, dict):
        raise UserError(f"{file}: quantization_config: kv_cache_scheme must be an object or null")
    expected: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("kv_cache_scheme.num_bits", scheme.get("num_bits"), (8,)),
        ("kv_cache_scheme.type", scheme.get("type"), ("float",)),
        ("kv_cache_scheme.symmetric", scheme.get("symmetric", True), (True,)),
        ("kv_cache_scheme.dynamic", scheme.get("dynamic", False), (False,)),
        ("kv_cache_scheme.strategy", scheme.get("strategy"), ("tensor",)),
    ]
    check_fields(file, expected)
    return True


def is_cache_scale(name: str) -> bool:
    """Whether a tensor is a scale of keys or values, by its name."""
    return name.endswith(_SUFFIXES)


def cache_attentions(folder: Path, names: Iterable[str], announced: bool) -> tuple[str, ...]:
    """The attention modules that have both scales, in file order.

    Raises:
        UserError: one of the two is missing, all are missing although the config announces them, or some exist although it does not.
    """
    scales = [name for name in names if is_cache_scale(name)]
    if scales and not announced:
        raise UserError(f"{folder}: {scales[0]}: config.json has no kv_cache_scheme that describes it; export again")
    # each attention once, in file order
    attentions = tuple(dict.fromkeys(name.rpartition(".")[0] for name in scales))
    missing = [attention + suffix for attention in attentions for suffix in _SUFFIXES if attention + suffix not in scales]
    if missing or (announced and not attentions):
        raise UserError(f"{folder}: {missing[0] if missing else 'every k_scale and v_scale'} is missing; the export is incomplete")
    return attentions


def cache_scales(stored: StoredTensors, attentions: Iterable[str]) -> dict[str, float]:
    """The scales by ``<attention module>.k`` and ``.v``; UserError if one is not a finite positive number."""
    names = [f"{attention}{suffix}" for attention in attentions for suffix in _SUFFIXES]
    return {name.removesuffix("_scale"): float(stored.scales(name, (1,))[0]) for name in names}
