"""The common part of the independent readers of exports, in numpy: tensors of a model folder, codes and scales, and fields of bits.

It shares no code with the writers (``packing.py``, ``export/``), so that a mistake there is found here. Every access reads the file again;
nothing is kept in memory. Sizes are checked against the bytes in the file before memory of that size is allocated.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...models.common.errors import UserError
from ...models.folder.safetensors_read import TensorInfo, read_header

INDEX = "model.safetensors.index.json"
FLOATS = ("BF16", "F16", "F32")
"""Dtypes of scales and plain tensors."""
# numpy has no bf16: its bits as uint16
_KINDS = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "I8": "i1", "U8": "u1", "F8_E4M3": "u1", "I32": "<i4", "I64": "<i8"}


@dataclass(frozen=True, kw_only=True)
class StoredScheme:
    """The quantization of a module's weight according to ``config.json``."""

    bits: int
    group_size: int | None
    """Inputs per scale; None = one scale per row."""
    symmetric: bool = True
    kind: str = "int"
    """Format of a code: int, nf4, fp8_e4m3, mxfp4 or nvfp4."""

    def __str__(self) -> str:
        if self.kind != "int":
            return f"kind={self.kind}, group_size={self.group_size or 'channel'}"
        return f"bits={self.bits}, group_size={self.group_size or 'channel'}, symmetric={str(self.symmetric).lower()}"


@dataclass(frozen=True, kw_only=True)
class StoredCodes:
    """A stored weight: w = (codes - zeros) * scales, with one scale and zero point per group."""

    codes: NDArray[np.int16]
    """[out, in], signed: in [-2^(b-1), 2^(b-1) - 1]."""
    scales: NDArray[np.float32]
    """[out, groups], finite and positive."""
    zeros: NDArray[np.int16]
    """[out, groups], signed as the codes; all 0 for symmetric weights."""

    def centred(self) -> NDArray[np.int16]:
        """[out, groups, group size]: codes minus zero points."""
        return self.codes.reshape(*self.scales.shape, -1) - self.zeros[:, :, None]

    def weight(self) -> NDArray[np.float32]:
        """fp32 [out, in]."""
        return (self.centred().astype(np.float32) * self.scales[:, :, None]).reshape(self.codes.shape)


@dataclass(frozen=True, kw_only=True)
class StoredFloats(StoredCodes):
    """A stored weight of floats: w = values * scales, or values * (scales / whole)."""

    values: NDArray[np.float32]
    """[out, in]: what the codes stand for. ``codes`` are their bits, and ``zeros`` are 0."""
    whole: np.float32 | None = None
    """The global scale of nvfp4, finite and positive."""

    def weight(self) -> NDArray[np.float32]:
        """fp32 [out, in]."""
        # the quotient in fp32 first, as kernels and the fake quantization take it
        scales = self.scales if self.whole is None else self.scales / self.whole
        return (self.values.reshape(*scales.shape, -1) * scales[:, :, None]).reshape(self.values.shape)


class Decoded(NamedTuple):
    """A quantized module, decoded once: its weight, codes and scales."""

    weight: NDArray[np.float32]
    """[out, in]"""
    codes: NDArray[np.int8]
    """[out, in], signed; of floats the bits."""
    scales: NDArray[np.float32]
    """[out, groups]; in / groups may be a part of the group that was trained."""


class WeightFolder(ABC):
    """An opened export in safetensors: its tensors by name, each as fp32."""

    folder: Path
    modules: tuple[str, ...]
    """Names of the quantized modules, in file order."""
    plain: tuple[str, ...]
    """Names of the tensors that are not quantized, in file order."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the full state dict under original names; tied tensors appear once."""

    @abstractmethod
    def tensor(self, name: str) -> NDArray[np.float32]:
        """The fp32 tensor ``name`` of the full state dict; UserError if it is damaged."""

    @abstractmethod
    def stored_codes(self, module: str) -> StoredCodes:
        """Codes, scales and zero points of a quantized module; UserError if they are damaged."""

    @abstractmethod
    def scheme_of(self, module: str) -> StoredScheme:
        """The quantization of a module according to the config."""

    @abstractmethod
    def unlisted(self, linears: tuple[str, ...]) -> list[str]:
        """Sentences about linears for which tensors and config disagree on whether they are packed."""

    def decode(self, module: str) -> Decoded:
        """Weight, codes and scales of a quantized module; UserError as ``stored_codes``."""
        stored = self.stored_codes(module)
        return Decoded(stored.weight(), stored.codes.astype(np.int8), stored.scales)

    def as_stored(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns ``values``: these formats store all tensors unchanged."""
        return values


@dataclass(frozen=True)
class _Place:
    file: Path
    start: int
    info: TensorInfo


class StoredTensors:
    """The tensors of a model folder by name, in ``model.safetensors`` or in the files of its index."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if the index or a file header is missing, damaged or foreign."""
        self.folder = Path(folder)
        self._places = _tensor_places(self.folder)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in file order."""
        return tuple(self._places)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._places[name].file

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._places[name].info.shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor, as safetensors names it."""
        return self._places[name].info.dtype

    def expect(self, name: str, dtypes: Sequence[str], shape: tuple[int, ...]) -> None:
        """Raises UserError if a tensor has another shape or none of these dtypes."""
        place = self._places[name]
        if place.info.dtype not in dtypes or place.info.shape != shape:
            raise UserError(
                f"{place.file}: {name} is {place.info.dtype} of shape {place.info.shape}, expected {' or '.join(dtypes)} of shape {shape}; "
                "the file is damaged or config.json belongs to another model, export again"
            )

    def matrix(self, name: str) -> tuple[int, int]:
        """Shape of a matrix of packed words; UserError if the tensor is not such a matrix, or is empty."""
        place = self._places[name]
        if place.info.dtype != "I32" or len(place.info.shape) != 2 or 0 in place.info.shape:
            raise UserError(
                f"{place.file}: {name} is {place.info.dtype} of shape {place.info.shape}, not a matrix of I32 words; export again"
            )
        return place.info.shape[0], place.info.shape[1]

    def integers(self, name: str) -> NDArray[Any]:
        """A tensor of I8, I32 or I64 as stored; U8 and F8_E4M3 as bytes."""
        info = self._places[name].info
        return self._raw(name, np.dtype(_KINDS[info.dtype])).reshape(info.shape)

    def words(self, name: str) -> NDArray[np.uint8]:
        """An I32 matrix [rows, words] as its bytes [rows, 4 words], the lowest first."""
        rows, words = self._places[name].info.shape
        # safetensors is little-endian, so the bytes of a word come lowest first
        return self._raw(name, np.dtype(np.uint8), 4).reshape(rows, words * 4)

    def floats(self, name: str) -> NDArray[np.float32]:
        """The exact values of a float tensor; UserError if it has another dtype, or is not finite."""
        place = self._places[name]
        if place.info.dtype not in FLOATS:
            raise UserError(f"{place.file}: {name} is {place.info.dtype}; weights are stored as {', '.join(FLOATS)} or packed")
        raw = self._raw(name, np.dtype(_KINDS[place.info.dtype]))
        if place.info.dtype == "BF16":  # the upper half of the same number in fp32
            raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        # bf16, fp16 and fp32 are exact in fp32
        values = raw.astype(np.float32).reshape(place.info.shape)
        if not np.isfinite(values).all():
            raise UserError(f"{place.file}: {name} holds NaN or infinite values; export again")
        return values

    def scales(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Scales of this shape; UserError if one is not finite and positive."""
        self.expect(name, FLOATS, shape)
        # zeros for values that are not finite, so that both faults give the same message
        try:
            values = self.floats(name)
        except UserError:
            values = np.zeros(1, np.float32)
        # a scale of 0 would hide its codes
        if not (values > 0).all():
            raise UserError(f"{self.file(name)}: {name} holds a scale that is not finite and positive; export again")
        return values

    def _raw(self, name: str, kind: np.dtype[Any], per_element: int = 1) -> NDArray[Any]:
        place = self._places[name]
        count = int(np.prod(place.info.shape, dtype=np.int64)) * per_element
        # reads this tensor's bytes and no others
        return np.fromfile(place.file, kind, count, offset=place.start + place.info.begin)


def bit_fields(data: NDArray[np.uint8], bits: int, count: int) -> tuple[NDArray[np.int16], bool]:
    """Unpacks numbers of ``bits`` bits from rows of bytes; the first number has the lowest bits of the first byte, and there are no gaps.

    Args:
        data: uint8 [rows, bytes].
        bits: 2 to 8.
        count: Numbers per row.

    Returns:
        (unsigned numbers [rows, count], whether a bit after the last number is set).
    """
    # widths that divide 8 need only shifts; the others are expanded to one byte per bit
    if 8 % bits == 0:
        # [rows, bytes, 8 / bits], then [rows, numbers]
        fields = (data[:, :, None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8((1 << bits) - 1)
        whole = fields.reshape(len(data), -1)
        return whole[:, :count].astype(np.int16), bool(whole[:, count:].any())
    # [rows, 8 bytes]: bit 0 of byte 0 first
    single = np.unpackbits(data, axis=1, bitorder="little")
    # [rows, count, bits] @ [bits]: bit k counts 2^k
    numbers = single[:, : count * bits].reshape(len(data), count, bits) @ (1 << np.arange(bits)).astype(np.int16)
    return numbers.astype(np.int16), bool(single[:, count * bits :].any())


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder; UserError if it is missing or not a JSON object."""
    return read_object(Path(folder) / "config.json", "give a model folder")


def read_object(file: Path, remedy: str) -> dict[str, Any]:
    """A JSON object without duplicate keys; UserError otherwise."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); export the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not an object; export the model again")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = next(key for position, (key, _) in enumerate(pairs) if key in dict(pairs[:position]))
        raise ValueError(f"the key {twice!r:.100} occurs twice, and readers differ in which one they use")
    return content


def _tensor_places(folder: Path) -> dict[str, _Place]:
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file() and index.is_file():
        raise UserError(
            f"{folder} has both {single.name} and {index.name}, and runtimes differ in which one they read; remove the wrong one"
        )
    if not single.is_file() and not index.is_file():
        raise UserError(f"{folder} has neither {single.name} nor {index.name}; the export is incomplete")
    # tensor -> file of the index; None for a single file
    mapped = None if single.is_file() else _weight_map(index)
    places: dict[str, _Place] = {}
    for file in [single] if mapped is None else [folder / name for name in sorted(set(mapped.values()))]:
        header = read_header(file)
        for name, info in header.tensors.items():
            # a tensor in two files: readers by index and readers of all files would differ
            if mapped is not None and mapped.get(name) != file.name:
                raise UserError(f"{file}: {name} is in this file, but {index.name} places it in {mapped.get(name)}; export again")
            places[name] = _Place(file, header.data_start, info)
    lost = sorted(set(mapped or ()) - set(places))
    if lost:
        raise UserError(f"{index}: {lost[0]} is in none of the files ({len(lost)} in all); the export is incomplete")
    return places


def _weight_map(index: Path) -> dict[str, str]:
    try:
        mapped = read_object(index, "export again")["weight_map"]
        # a path out of the folder would read files that are no part of the export
        outside = [file for file in mapped.values() if not isinstance(file, str) or Path(file).name != file or "\0" in file]
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a readable index ({error}); export again") from error
    if outside:
        raise UserError(f"{index}: {outside[0]!r:.200} is not a file name inside the folder; the index is damaged or foreign")
    return mapped
