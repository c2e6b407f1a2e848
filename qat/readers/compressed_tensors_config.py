"""Reads ``quantization_config`` of a compressed-tensors folder, field by field: which module is quantized, and how.

Source: compressed-tensors ``quantization/quant_config.py``, ``quantization/quant_args.py``, ``utils/match.py``.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.common.errors import UserError
from .compressed_tensors_floats import FLOAT_FORMATS, read_float_weights
from .fields import BITS, check_fields, check_module_names, module_pattern, read_quantization
from .kv_cache import read_cache_scheme
from .tensors import StoredScheme

FORMATS = ("pack-quantized", "int-quantized", *FLOAT_FORMATS)


@dataclass(frozen=True, kw_only=True)
class InputScheme:
    """How inputs are quantized."""

    dynamic: bool
    """True: scales of a token are computed in the forward pass. False: one stored scale; of nvfp4 the one above those of its blocks."""
    symmetric: bool
    kind: str = "int8"
    """int8, or the kind of the weights."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """One entry of ``config_groups``."""

    targets: tuple[str, ...]
    """Module names, ``re:`` patterns, or class names."""
    format: str
    weights: StoredScheme
    inputs: InputScheme | None


@dataclass(frozen=True, kw_only=True)
class PackedScheme:
    """The content of ``quantization_config`` about packed weights."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    """Names (or ``re:`` patterns) of linears that are not packed."""
    cache: bool = False
    """Whether keys and values are quantized to fp8 with stored scales."""

    @property
    def bits(self) -> int:
        """Bits of the first group."""
        return self.groups[0].weights.bits

    @property
    def group_size(self) -> int | None:
        """Group size of the first group; None = one scale per row."""
        return self.groups[0].weights.group_size

    def of(self, module: str) -> Group:
        """The group of a module: the first with its name, else with a matching pattern, else with the class Linear, else the first."""
        return self._find(module) or self.groups[0]

    def announces(self, module: str) -> bool:
        """Whether the config announces a linear of this name as packed."""
        # ``ignore`` wins over every group, as in the package
        return not any(_matches(module, name) for name in self.ignore) and self._find(module) is not None

    def _find(self, module: str) -> Group | None:
        # generators: the search ends at the first group that fits, an exact name before a pattern, a pattern before a class
        by_name = (group for group in self.groups if module in group.targets)
        by_pattern = (group for group in self.groups if any(_matches(module, target) for target in group.targets))
        by_class = (group for group in self.groups if "Linear" in group.targets)
        return next(by_name, None) or next(by_pattern, None) or next(by_class, None)


def _matches(module: str, target: str) -> bool:
    # match, not fullmatch: compressed-tensors' own rule, under which a pattern may end before the name does
    return re.match(target[3:], module) is not None if target.startswith("re:") else module == target


def read_packed_scheme(folder: Path) -> PackedScheme:
    """The scheme in ``config.json``.

    Raises:
        UserError: the folder is not packed, or in a way that this reader does not know; the message names the field.
    """
    file, quantization = read_quantization(folder)
    # method, format and status first: with another one of these, no other field has the meaning that is read below
    whole = quantization.get("format")
    check_fields(file, [("quant_method", quantization.get("quant_method"), ("compressed-tensors",))])
    check_fields(file, [("format", whole, (*FORMATS, "mixed-precision"))])
    check_fields(file, [("quantization_status", quantization.get("quantization_status"), ("compressed",))])
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UserError(f"{file}: quantization_config.config_groups must hold at least one group with weights")
    return PackedScheme(
        groups=tuple(_group(file, name, group, str(whole)) for name, group in groups.items()),
        ignore=_names(file, "ignore", quantization.get("ignore") or []),
        cache=read_cache_scheme(file, quantization.get("kv_cache_scheme")),
    )


def _group(file: Path, name: str, group: Any, whole: str) -> Group:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(weights, dict):
        raise UserError(f"{file}: quantization_config.config_groups[{name!r:.100}] must be an object with weights")
    form = group.get("format") or whole
    # a group without a format of its own has that of the file
    check_fields(file, [("the format of a group", form, FORMATS if whole == "mixed-precision" else (whole,))])
    check_fields(file, [("output_activations", group.get("output_activations"), (None,))])
    if form in FLOAT_FORMATS:
        scheme = read_float_weights(file, form, weights)
        inputs = _inputs(file, group.get("input_activations"), scheme.kind)
        return Group(targets=_names(file, "targets", group.get("targets") or ["Linear"]), format=form, weights=scheme, inputs=inputs)
    expected: list[tuple[str, Any, tuple[Any, ...]]] = [
        # int-quantized stores one byte per code
        ("weights.num_bits", weights.get("num_bits"), (8,) if form == "int-quantized" else BITS),
        ("weights.type", weights.get("type"), ("int",)),
        ("weights.symmetric", weights.get("symmetric"), (True, False)),
        ("weights.strategy", weights.get("strategy"), ("group", "channel")),
        ("weights.dynamic", weights.get("dynamic", False), (False,)),
        # static and weight name how the codes were found; groups stay ranges of inputs, as without either
        ("weights.actorder", weights.get("actorder"), (None, "static", "weight")),
    ]
    check_fields(file, expected)
    size = weights.get("group_size")
    # with strategy channel the size may be null or anything: it is not used
    if weights["strategy"] == "group" and (type(size) is not int or size < 1):
        raise UserError(f"{file}: quantization_config: weights.group_size is {size!r}; strategy 'group' needs a positive whole number")
    return Group(
        targets=_names(file, "targets", group.get("targets") or ["Linear"]),
        format=form,
        weights=StoredScheme(
            bits=weights["num_bits"], group_size=size if weights["strategy"] == "group" else None, symmetric=weights["symmetric"]
        ),
        inputs=_inputs(file, group.get("input_activations"), "int8"),
    )


def _inputs(file: Path, inputs: Any, kind: str) -> InputScheme | None:
    """The scheme of inputs; UserError if it is not of this kind, in which the weights' kernels multiply."""
    if inputs is None:
        return None
    if not isinstance(inputs, dict):
        raise UserError(f"{file}: quantization_config: input_activations must be an object or null")
    dynamic = inputs.get("dynamic")
    # in blocks: mxfp4 computes all scales at run time, nvfp4 those of the blocks, under a stored one
    block: dict[str, tuple[Any, str, int]] = {"mxfp4": (True, "group", 32), "nvfp4": ("local", "tensor_group", 16)}
    allowed, strategy, size = block.get(kind, (None, "", 0))
    expected: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("input_activations.num_bits", inputs.get("num_bits"), (4,) if size else (8,)),
        ("input_activations.type", inputs.get("type"), ("int",) if kind == "int8" else ("float",)),
        ("input_activations.symmetric", inputs.get("symmetric", True), (True, False) if kind == "int8" else (True,)),
        ("input_activations.dynamic", dynamic, (allowed,) if size else (True, False)),
        # one scale per token can only be computed at run time, a stored one can only be for all tokens
        ("input_activations.strategy", inputs.get("strategy"), (strategy,) if size else ("token",) if dynamic else ("tensor",)),
        *([("input_activations.group_size", inputs.get("group_size"), (size,))] if size else []),
    ]
    check_fields(file, expected)
    return InputScheme(dynamic=dynamic is True, symmetric=inputs.get("symmetric", True), kind=kind)


def _names(file: Path, key: str, names: Any) -> tuple[str, ...]:
    checked = check_module_names(file, key, names)
    for name in checked:
        if name.startswith("re:"):
            module_pattern(file, key, name[3:])
    return checked
