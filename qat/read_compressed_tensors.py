"""An independent reader of compressed-tensors "pack-quantized" folders, in numpy.

It shares no code with the writer (``packing.py``, ``export/``): bits are taken out of bytes, not words, so that a mistake made
there is seen here. It reads exports by others too, as long as they are symmetric 2, 4 or 8-bit integer weights per group or per
row. Source of the layout: compressed-tensors ``compressors/pack_quantized/base.py`` and ``quantization/quant_args.py``.

Per quantized module P: ``P.weight_packed`` int32 [out, ceil(in b / 32)], ``P.weight_scale`` [out, groups], ``P.weight_shape`` int64 [2].
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.errors import UserError
from ..models.safetensors_file import TensorInfo, read_header

_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
_FOREIGN = (".weight_zero_point", ".weight_g_idx", ".weight_global_scale", ".input_scale", ".input_zero_point")
_BITS = (2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class PackedScheme:
    """What ``quantization_config`` says about the packed weights."""

    bits: int
    group_size: int | None
    """None: one scale per row."""
    ignore: tuple[str, ...]
    """Names (or ``re:`` patterns) of linears that are not packed."""


@dataclass(frozen=True)
class _Place:
    file: Path
    start: int
    info: TensorInfo


def is_packed(folder: Path) -> bool:
    """Whether the config of a model folder announces quantized weights of any kind."""
    return "quantization_config" in read_config(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder; UserError when it is missing or no JSON object."""
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); give a model folder") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); export the model again") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds a {type(config).__name__}, not an object; export the model again")
    return config


def read_scheme(folder: Path) -> PackedScheme:
    """The scheme in ``config.json``.

    Raises:
        UserError: the folder is not packed, or in a way this reader does not know; the message names the field.
    """
    file, quantization = Path(folder) / "config.json", read_config(folder).get("quantization_config")
    if not isinstance(quantization, dict):
        raise UserError(f"{file} has no quantization_config: the folder holds plain weights; run 'decoct export' on a quantized folder")
    groups = quantization.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(weights, dict):
        raise UserError(f"{file}: quantization_config.config_groups must hold exactly one group with weights; this reader knows no other")
    _check_scheme(file, quantization, group, weights)
    ignore = quantization.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
        raise UserError(f"{file}: quantization_config.ignore must be a list of module names")
    return PackedScheme(
        bits=weights["num_bits"],
        group_size=weights["group_size"] if weights["strategy"] == "group" else None,
        ignore=tuple(ignore),
    )


def _check_scheme(file: Path, quantization: dict[str, Any], group: dict[str, Any], weights: dict[str, Any]) -> None:
    expected: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("quant_method", quantization.get("quant_method"), ("compressed-tensors",)),
        ("format", quantization.get("format"), ("pack-quantized",)),
        ("quantization_status", quantization.get("quantization_status"), ("compressed",)),
        ("input_activations", group.get("input_activations"), (None,)),
        ("output_activations", group.get("output_activations"), (None,)),
        ("weights.num_bits", weights.get("num_bits"), _BITS),
        ("weights.type", weights.get("type"), ("int",)),
        ("weights.symmetric", weights.get("symmetric"), (True,)),
        ("weights.strategy", weights.get("strategy"), ("group", "channel")),
        ("weights.dynamic", weights.get("dynamic", False), (False,)),
    ]
    for name, value, allowed in expected:
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            choices = " or ".join(map(repr, allowed))
            raise UserError(f"{file}: quantization_config: {name} is {value!r}; this reader knows {choices}")
    size = weights.get("group_size")
    if weights["strategy"] == "group" and (type(size) is not int or size < 1):
        raise UserError(f"{file}: quantization_config: weights.group_size is {size!r}; strategy 'group' needs a positive whole number")


class PackedFolder:
    """An opened export: which tensors it has, and each of them as fp32. Every access reads the file anew; nothing is kept."""

    def __init__(self, folder: Path) -> None:
        """UserError when config, index or a file header is missing, damaged or foreign."""
        self.folder = Path(folder)
        self.scheme = read_scheme(self.folder)
        self._places = _tensor_places(self.folder)
        foreign = [name for name in self._places if name.endswith(_FOREIGN)]
        if foreign:
            file = self._places[foreign[0]].file
            raise UserError(f"{file}: {foreign[0]}: zero points, reordered groups and activation scales are unknown to this reader")
        self.modules = tuple(name.removesuffix(_PACKED) for name in self._places if name.endswith(_PACKED))
        """Names of the packed modules, in file order."""
        parts = {module + suffix for module in self.modules for suffix in (_PACKED, _SCALE, _SHAPE)}
        self.plain = tuple(name for name in self._places if name not in parts)
        """Names of the tensors that are not packed, in file order."""
        self._check_names(parts)

    def _check_names(self, parts: set[str]) -> None:
        """Every packed module has all its tensors and no second, plain weight; no part is left over."""
        for name in self.plain:
            if name.endswith((_SCALE, _SHAPE)):
                raise UserError(f"{self._places[name].file}: {name} belongs to no {_PACKED[1:]}; the export is incomplete")
            if name.removesuffix(".weight") + _PACKED in parts:
                raise UserError(f"{self._places[name].file}: {name} is stored twice, packed and plain; export again")
        for name in sorted(parts - set(self._places)):
            raise UserError(f"{self.folder}: {name} is missing; the export is incomplete")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the full state dict, under original names."""
        packed = {f"{module}.weight": self._shape(module) for module in self.modules}
        return packed | {name: self._places[name].info.shape for name in self.plain}

    def codes_and_scales(self, module: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """(codes [out, in], scales [out, groups]) of a packed module.

        Raises:
            UserError: shapes or dtypes do not fit, a scale is not finite and positive, or unused bits are set.
        """
        rows, columns = self._shape(module)
        place, bits = self._places[module + _PACKED], self.scheme.bits
        words = -(-columns * bits // 32)
        self._expect(module + _PACKED, ("I32",), (rows, words))
        data = np.fromfile(place.file, np.uint8, rows * words * 4, offset=place.start + place.info.begin).reshape(rows, words * 4)
        # within a word the first code has the lowest bits and words are little-endian: the first code has the lowest bits of byte 0
        fields = (data[:, :, None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8((1 << bits) - 1)
        unsigned = fields.reshape(rows, -1)
        if unsigned[:, columns:].any():
            raise UserError(f"{place.file}: {module}{_PACKED} has bits set behind the last column; the file is damaged, export again")
        codes = (unsigned[:, :columns].astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
        return codes, self._scales(module, rows, columns)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The fp32 tensor ``name`` of the full state dict: codes times scales, or a plain tensor's exact value.

        Raises:
            UserError: as ``codes_and_scales``, or a plain tensor that is not a finite bf16, fp16 or fp32 one.
        """
        module = name.removesuffix(".weight")
        if name in self._places:
            value = self._floats(name)
            if not np.isfinite(value).all():
                raise UserError(f"{self._places[name].file}: {name} holds NaN or infinite values; export again")
            return value
        codes, scales = self.codes_and_scales(module)
        grouped = codes.reshape(codes.shape[0], scales.shape[1], -1).astype(np.float32)
        return (grouped * scales[:, :, None]).reshape(codes.shape)

    def as_stored(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """``values``: this format stores every tensor as it is."""
        return values

    def _shape(self, module: str) -> tuple[int, int]:
        place = self._places[module + _SHAPE]
        self._expect(module + _SHAPE, ("I64", "I32"), (2,))
        kind = np.dtype("<i8" if place.info.dtype == "I64" else "<i4")
        rows, columns = (int(n) for n in np.fromfile(place.file, kind, 2, offset=place.start + place.info.begin))
        # before anything of that size is made: the packed tensor, whose bytes are really there, must agree
        self._expect(module + _PACKED, ("I32",), (rows, -(-columns * self.scheme.bits // 32)))
        return rows, columns

    def _scales(self, module: str, rows: int, columns: int) -> NDArray[np.float32]:
        name, width = module + _SCALE, self.scheme.group_size or columns
        if not width or columns % width:
            raise UserError(f"{self._places[name].file}: {module}: group_size {width} does not divide its {columns} columns; export again")
        self._expect(name, ("BF16", "F16", "F32"), (rows, columns // width))
        scales = self._floats(name)
        if not (np.isfinite(scales) & (scales > 0)).all():
            raise UserError(f"{self._places[name].file}: {name} holds a scale that is not finite and positive; export again")
        return scales

    def _expect(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        place = self._places[name]
        if place.info.dtype not in dtypes or place.info.shape != shape:
            raise UserError(
                f"{place.file}: {name} is {place.info.dtype} of shape {place.info.shape}, expected {' or '.join(dtypes)} of shape {shape}; "
                "the file is damaged or config.json belongs to another model, export again"
            )

    def _floats(self, name: str) -> NDArray[np.float32]:
        place = self._places[name]
        kinds = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
        if place.info.dtype not in kinds:
            raise UserError(f"{place.file}: {name} is {place.info.dtype}; weights are stored as {', '.join(kinds)} or packed")
        count = int(np.prod(place.info.shape, dtype=np.int64))
        raw = np.fromfile(place.file, np.dtype(kinds[place.info.dtype]), count, offset=place.start + place.info.begin)
        if place.info.dtype == "BF16":  # the upper half of the same number in fp32
            raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return raw.astype(np.float32).reshape(place.info.shape)


def dequantized_tensors(folder: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The full state dict of an export under original names, tensor by tensor, as fp32: what a runtime multiplies with.

    Tied tensors come once, as stored.

    Raises:
        UserError: the folder is damaged or not of a kind this reader knows.
    """
    opened = PackedFolder(folder)
    for name in opened.shapes():
        yield name, opened.tensor(name)


def _tensor_places(folder: Path) -> dict[str, _Place]:
    """Where every tensor lies: of ``model.safetensors``, or of the files that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise UserError(f"{folder} has both {single.name} and {index.name}: runtimes differ in which they read; remove the wrong one")
    if not single.is_file() and not index.is_file():
        raise UserError(f"{folder} has neither {single.name} nor {index.name}; the export is incomplete")
    mapped = None if single.is_file() else _weight_map(index)
    places: dict[str, _Place] = {}
    for file in [single] if mapped is None else [folder / name for name in sorted(set(mapped.values()))]:
        header = read_header(file)
        for name, info in header.tensors.items():
            if mapped is not None and mapped.get(name) != file.name:
                raise UserError(f"{file}: {name} is in this file, but {index.name} places it in {mapped.get(name)}; export again")
            places[name] = _Place(file, header.data_start, info)
    lost = sorted(set(mapped or ()) - set(places))
    if lost:
        raise UserError(f"{index}: {lost[0]} is in none of the files ({len(lost)} in all); the export is incomplete")
    return places


def _weight_map(index: Path) -> dict[str, str]:
    try:
        mapped = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = [file for file in mapped.values() if not isinstance(file, str) or Path(file).name != file]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a readable index ({error}); export again") from error
    if outside:
        raise UserError(f"{index}: {outside[0]!r} is not a file name inside the folder; the index is damaged or foreign")
    return mapped
