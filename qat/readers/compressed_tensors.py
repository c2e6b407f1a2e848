"""An independent reader of compressed-tensors folders, in numpy.

It shares no code with the writer (``packing.py``, ``export/``): it takes bits out of bytes, not words, so that a mistake there is found
here. It also reads exports by other tools: the formats "pack-quantized" and "int-quantized", symmetric or not, one scale per group or
per row, one scheme or several, and those of floats (``compressed_tensors_floats.py``). Source of the layout: compressed-tensors
``compressors/pack_quantized/base.py``, ``compressors/naive_quantized/base.py`` and ``quantization/quant_args.py``.

    pack-quantized   P.weight_packed int32 [out, ceil(in b / 32)], P.weight_shape int64 [2]; P.weight_zero_point int32
                     [ceil(out b / 32), groups], packed along the outputs
    int-quantized    P.weight int8 [out, in]; P.weight_zero_point int8 [out, 1]; P.input_scale, P.input_zero_point [1] when static
    both             P.weight_scale [out, groups]; w = (q - z) * s; keys and values as in ``kv_cache.py``

Codes of 3, 5, 6 and 7 bits are read as the dense stream of version 0.18 and later.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...models.common.errors import UserError
from .compressed_tensors_config import read_packed_scheme
from .compressed_tensors_floats import FLOAT_FORMATS, GLOBAL, INPUT_GLOBAL, float_shape, read_floats
from .kv_cache import cache_attentions, cache_scales, is_cache_scale
from .tensors import StoredCodes, StoredScheme, StoredTensors, WeightFolder, bit_fields, read_config

_PACKED, _SCALE, _SHAPE, _ZERO = ".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point"
_INPUT_SCALE, _INPUT_ZERO = ".input_scale", ".input_zero_point"
# Reordered inputs (actorder "group").
_FOREIGN = ".weight_g_idx"
_PLACES = {
    "pack-quantized": (_PACKED, "I32"),
    "int-quantized": (".weight", "I8"),
    **{form: (".weight", "F8_E4M3") if kind == "fp8_e4m3" else (_PACKED, "U8") for form, kind in FLOAT_FORMATS.items()},
}
"""Layout -> the tensor of a module's codes and its dtype."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """How the inputs of a module are quantized."""

    dynamic: bool
    """True: scales of a token, computed at run time. False: one stored scale; of nvfp4 the one by which those of blocks are divided."""
    symmetric: bool
    scale: float | None = None
    """Only for static scaling."""
    zero: int = 0
    """Only for static scaling."""
    kind: str = "int8"
    """int8, fp8_e4m3, mxfp4 or nvfp4."""


def is_packed(folder: Path) -> bool:
    """Whether the config of a model folder announces quantized weights of any kind."""
    return "quantization_config" in read_config(folder)


class PackedFolder(WeightFolder):
    """An opened export: its tensors by name, each as fp32. Every access reads the file again; nothing is kept in memory."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if config, index or a file header is missing, damaged or foreign."""
        self.folder = Path(folder)
        self.scheme = read_packed_scheme(self.folder)
        self._stored = StoredTensors(self.folder)
        names = self._stored.names
        for name in names:
            if name.endswith(_FOREIGN):
                raise UserError(f"{self._stored.file(name)}: {name}: this reader does not know reordered groups")
        # 1. which modules are quantized, by their tensors
        packed = {name.removesuffix(_PACKED) for name in names if name.endswith(_PACKED)}
        # codes of a byte keep the plain name; the dtype and a scale beside it mark such a weight
        bytewise = (n.removesuffix(".weight") for n in names if n.endswith(".weight") and self._stored.dtype(n) in ("I8", "F8_E4M3"))
        self._unpacked = frozenset(module for module in bytewise if module + _SCALE in self._stored)
        # in the order of the files, each module once
        heads = dict.fromkeys(name.removesuffix(_PACKED).removesuffix(".weight") for name in names)
        self.modules = tuple(head for head in heads if head in packed or head in self._unpacked)
        # 2. the tensors that such modules must have; all others are plain
        needed = {module + suffix for module in packed for suffix in (_PACKED, _SCALE, self._third(module))}
        needed |= {module + suffix for module in self._unpacked for suffix in (".weight", _SCALE)}
        needed |= {module + _ZERO for module in self.modules if not self.scheme_of(module).symmetric}
        needed |= {name for module in self.modules for name in self._input_names(module)}
        self.attentions = cache_attentions(self.folder, names, self.scheme.cache)
        self.plain = tuple(name for name in names if name not in needed and not is_cache_scale(name))
        self._quantized = frozenset(f"{module}.weight" for module in self.modules)
        self._check_names(needed)

    def _third(self, module: str) -> str:
        """The tensor of a packed module beside codes and scales: the shape that words do not tell, or a global scale."""
        return {"int": _SHAPE, "mxfp4": _SCALE}.get(self.scheme_of(module).kind, GLOBAL)

    def _input_names(self, module: str) -> list[str]:
        inputs = self.scheme.of(module).inputs
        if inputs is None or inputs.dynamic:
            return []
        if inputs.kind == "nvfp4":
            return [module + INPUT_GLOBAL]
        return [module + _INPUT_SCALE] + ([] if inputs.symmetric else [module + _INPUT_ZERO])

    def _check_names(self, needed: set[str]) -> None:
        """Checks that every module has all its tensors and no second, plain weight, and that no tensor is left over."""
        for name in self.plain:
            file = self._stored.file(name)
            if name.endswith((_SCALE, _SHAPE)):
                raise UserError(f"{file}: {name} belongs to no {_PACKED[1:]}; the export is incomplete")
            if name.endswith((_ZERO, _INPUT_SCALE, _INPUT_ZERO, GLOBAL, INPUT_GLOBAL)):
                raise UserError(f"{file}: {name}: config.json does not announce such zero points or scales; export again")
            if name.removesuffix(".weight") + _PACKED in needed:
                raise UserError(f"{file}: {name} is stored twice, packed and plain; export again")
        for name in sorted(name for name in needed if name not in self._stored):
            raise UserError(f"{self.folder}: {name} is missing; the export is incomplete")
        for module in self.modules:
            name = f"{module}.weight" if module in self._unpacked else module + _PACKED
            place, announced = (name.removeprefix(module), self._stored.dtype(name)), self.scheme.of(module).format
            # another dtype than any layout has is refused where the codes are read
            form = next((form for form, own in _PLACES.items() if own == place), announced)
            if _PLACES[announced] != _PLACES[form]:
                raise UserError(f"{self.folder}: {module} is {form}, but its group in config.json has {announced}")

    def scheme_of(self, module: str) -> StoredScheme:
        """Bits, group size and symmetry of a quantized module."""
        return self.scheme.of(module).weights

    def inputs(self, module: str) -> Inputs | None:
        """How the inputs of a quantized module are quantized; None if they are not.

        Raises:
            UserError: a stored scale is not one finite positive number, or a zero point does not fit.
        """
        kind = self.scheme.of(module).inputs
        if kind is None or kind.dynamic:
            return kind and Inputs(dynamic=True, symmetric=kind.symmetric, kind=kind.kind)
        name = module + (INPUT_GLOBAL if kind.kind == "nvfp4" else _INPUT_SCALE)
        # one number, which some tools store without a dimension
        scale, zero = float(self._stored.scales(name, () if self._stored.shape(name) == () else (1,)).reshape(())), 0
        if not kind.symmetric:
            self._stored.expect(module + _INPUT_ZERO, ("I8",), (1,))
            zero = int(self._stored.integers(module + _INPUT_ZERO)[0])
        return Inputs(dynamic=False, symmetric=kind.symmetric, scale=scale, zero=zero, kind=kind.kind)

    def global_scale(self, module: str) -> float | None:
        """The scale by which those of groups are divided (nvfp4); None for other kinds. UserError if it is not one positive number."""
        return float(self._stored.scales(module + GLOBAL, (1,))[0]) if self.scheme_of(module).kind == "nvfp4" else None

    def cache(self) -> dict[str, float] | None:
        """Scales of keys and values in fp8 by ``<attention module>.k`` and ``.v``; None if they are not quantized.

        Raises:
            UserError: a scale is not a finite positive number.
        """
        return cache_scales(self._stored, self.attentions) if self.scheme.cache else None

    def unlisted(self, linears: tuple[str, ...]) -> list[str]:
        """Sentences about linears for which tensors and config disagree on whether they are packed."""
        problems = []
        for name in linears:
            announced = self.scheme.announces(name)
            if announced and name not in self.modules:
                problems.append(f"{name} is not packed, but quantization_config.ignore does not name it")
            if not announced and name in self.modules:
                problems.append(f"{name} is packed, but quantization_config.ignore names it, or no group has it")
        return problems

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the full state dict, under original names."""
        packed = {f"{module}.weight": self._shape(module) for module in self.modules}
        return packed | {name: self._stored.shape(name) for name in self.plain}

    def stored_codes(self, module: str) -> StoredCodes:
        """Codes, scales and zero points of a quantized module.

        Raises:
            UserError: shapes or dtypes do not fit, a scale is not finite and positive, or unused bits are set.
        """
        (rows, columns), scheme = self._shape(module), self.scheme_of(module)
        if scheme.kind != "int":
            return read_floats(self._stored, module, scheme.kind)
        width = scheme.group_size or columns
        # a last group of fewer columns would shift no code, but its scale would be that of no group
        if columns % width:
            file = self._stored.file(module + _SCALE)
            raise UserError(f"{file}: {module}: group_size {width} does not divide its {columns} columns; export again")
        groups, half = columns // width, 1 << (scheme.bits - 1)
        if module in self._unpacked:
            # int16: code - zero point of two int8 numbers may need 9 bits
            codes = self._stored.integers(f"{module}.weight").astype(np.int16)
            if codes.min() < -half or codes.max() >= half:
                raise UserError(f"{self._stored.file(f'{module}.weight')}: {module}.weight has codes outside {-half}..{half - 1}")
        else:
            codes = self._fields(module + _PACKED, self._stored.words(module + _PACKED), scheme.bits, columns)
        scales = self._stored.scales(module + _SCALE, (rows, groups))
        return StoredCodes(codes=codes, scales=scales, zeros=self._zeros(module, rows, groups, scheme))

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The fp32 tensor ``name`` of the full state dict: decoded, or a plain tensor's exact values.

        Raises:
            UserError: as ``stored_codes``, or a plain tensor is not bf16, fp16 or fp32, or not finite.
        """
        return self._stored.floats(name) if name not in self._quantized else self.stored_codes(name.removesuffix(".weight")).weight()

    def _zeros(self, module: str, rows: int, groups: int, scheme: StoredScheme) -> NDArray[np.int16]:
        name = module + _ZERO
        if scheme.symmetric:
            return np.zeros((rows, groups), np.int16)
        if module in self._unpacked:
            self._stored.expect(name, ("I8",), (rows, groups))
            return self._stored.integers(name).astype(np.int16)
        # zero points are packed along the outputs
        words = -(-rows * scheme.bits // 32)
        self._stored.expect(name, ("I32",), (words, groups))
        # [words, groups] -> [groups, words], each word's bytes kept together
        data = self._stored.words(name).reshape(words, groups, 4).transpose(1, 0, 2).reshape(groups, words * 4)
        # [groups, out] -> [out, groups]
        return self._fields(name, data, scheme.bits, rows).T

    def _fields(self, name: str, data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int16]:
        # in a word the first code has the lowest bits, and words are little-endian: so the first code has the lowest bits of byte 0
        unsigned, more = bit_fields(data, bits, count)
        if more:
            raise UserError(f"{self._stored.file(name)}: {name} has bits set after the last column; the file is damaged, export again")
        return unsigned - (1 << (bits - 1))

    def as_stored(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns ``values``: this format stores every tensor unchanged."""
        return values

    def _shape(self, module: str) -> tuple[int, int]:
        if (kind := self.scheme_of(module).kind) != "int":
            return float_shape(self._stored, module, kind)
        if module in self._unpacked:
            shape = self._stored.shape(f"{module}.weight")
            if len(shape) != 2 or 0 in shape:
                raise UserError(f"{self._stored.file(f'{module}.weight')}: {module}.weight has shape {shape}, not a matrix; export again")
            return shape[0], shape[1]
        name = module + _SHAPE
        self._stored.expect(name, ("I64", "I32"), (2,))
        rows, columns = (int(n) for n in self._stored.integers(name))
        self._stored.matrix(module + _PACKED)
        # a damaged weight_shape could ask for any amount of memory: the packed tensor, whose bytes exist, must agree with it first
        self._stored.expect(module + _PACKED, ("I32",), (rows, -(-columns * self.scheme_of(module).bits // 32)))
        return rows, columns
