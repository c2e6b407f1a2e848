"""An independent reader of bitsandbytes folders, int8 and NF4, in numpy.

int8, per module P: ``P.weight`` int8 [out, in], ``P.SCB`` fp32 [out], ``P.weight_format`` uint8 (0 = row by row); w = q * (SCB / 127).
NF4: ``P.weight`` uint8 [out * in / 2, 1], two table indices per byte, the first in the high four bits; ``P.weight.absmax`` fp32 [blocks];
``P.weight.quant_map`` fp32 [16]; ``P.weight.quant_state.bitsandbytes__nf4`` uint8, JSON with ``quant_type``, ``blocksize``, ``dtype`` and
``shape``; w = table[index] * absmax of the block. Source: bitsandbytes ``functional.py`` (QuantState, get_4bit_type), ``nn/modules.py``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.common.errors import UserError
from .fields import check_fields, check_module_names, read_quantization
from .tensors import Decoded, StoredCodes, StoredScheme, StoredTensors, WeightFolder

_SCB, _FORMAT = ".SCB", ".weight_format"
_ABSMAX, _MAP, _STATE = ".weight.absmax", ".weight.quant_map", ".weight.quant_state.bitsandbytes__nf4"
_INT8_PARTS, _NF4_PARTS = (".weight", _SCB, _FORMAT), (".weight", _ABSMAX, _MAP, _STATE)
_NESTED = (".weight.nested_absmax", ".weight.nested_quant_map")
_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NF4's values (``get_4bit_type``)."""
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class _Packed:
    """The description beside NF4 codes."""

    shape: tuple[int, int]
    block: int


class BitsandbytesFolder(WeightFolder):
    """An opened bitsandbytes export: its tensors by name, each as fp32."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if config, index or a file header is missing, damaged or foreign, or a module's tensors are incomplete."""
        self.folder = Path(folder)
        self.nf4, self.threshold, self.skipped = read_bitsandbytes_config(self.folder)
        self._stored = StoredTensors(self.folder)
        names = self._stored.names
        marker, suffixes = (_STATE, _NF4_PARTS) if self.nf4 else (_SCB, _INT8_PARTS)
        self.modules = tuple(name.removesuffix(marker) for name in names if name.endswith(marker))
        parts = {module + suffix for module in self.modules for suffix in suffixes}
        self.plain = tuple(name for name in names if name not in parts)
        for name in sorted(parts - set(names)):
            raise UserError(f"{self.folder}: {name} is missing; the export is incomplete")
        for name in self.plain:
            if name.endswith(_NESTED):
                raise UserError(
                    f"{self._stored.file(name)}: {name}: absmax values that are quantized themselves (double quant) are not read"
                )
            if name.endswith((_SCB, _FORMAT, _ABSMAX, _MAP)) or ".quant_state." in name:
                raise UserError(f"{self._stored.file(name)}: {name} belongs to no packed weight; the export is incomplete")
        # small, and their sizes decide those of the weights
        self._packed = {module: self._description(module) for module in self.modules} if self.nf4 else {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the full state dict, under original names."""
        packed = {f"{module}.weight": self._shape(module) for module in self.modules}
        return packed | {name: self._stored.shape(name) for name in self.plain}

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The fp32 tensor ``name`` of the full state dict; UserError as ``decode``, or if a plain tensor is not float or not finite."""
        module = name.removesuffix(".weight")
        return self.decode(module).weight if name.endswith(".weight") and module in self.modules else self._stored.floats(name)

    def decode(self, module: str) -> Decoded:
        """Weight, codes (of NF4: indices into the table) and scales of a packed module; UserError if they are damaged."""
        if not self.nf4:
            return super().decode(module)
        packed = self._packed[module]
        rows, columns = packed.shape
        data = self._stored.integers(module + ".weight").reshape(-1)
        # the high half of a byte comes first
        indices = np.stack([data >> 4, data & 15], axis=1).reshape(rows, columns)
        scales = self._stored.scales(module + _ABSMAX, (rows * columns // packed.block,)).reshape(rows, -1)
        values = np.array(_TABLE, np.float32)[indices].reshape(rows, scales.shape[1], -1)
        return Decoded((values * scales[:, :, None]).reshape(rows, columns), indices.astype(np.int8), scales)

    def stored_codes(self, module: str) -> StoredCodes:
        """Codes and scales of an int8 module; UserError if they are damaged, or the module holds NF4, whose codes are no numbers."""
        if self.nf4:
            raise UserError(f"{self.folder}: {module} holds indices into a table, not integer codes")
        rows, columns = self._shape(module)
        self._stored.expect(module + ".weight", ("I8",), (rows, columns))
        self._stored.expect(module + _FORMAT, ("U8",), ())
        if int(self._stored.integers(module + _FORMAT).reshape(())) != 0:
            raise UserError(f"{self._stored.file(module + _FORMAT)}: {module} is stored in a layout of old GPUs; save it again row by row")
        scales = self._stored.scales(module + _SCB, (rows,)) / np.float32(127)
        codes = self._stored.integers(module + ".weight").astype(np.int16)
        return StoredCodes(codes=codes, scales=scales[:, None], zeros=np.zeros((rows, 1), np.int16))

    def scheme_of(self, module: str) -> StoredScheme:
        """Bits and block size."""
        if self.nf4:
            return StoredScheme(bits=4, group_size=self._packed[module].block, kind="nf4")
        return StoredScheme(bits=8, group_size=None)

    def unlisted(self, linears: tuple[str, ...]) -> list[str]:
        """Sentences about linears for which tensors and config disagree on whether they are packed."""
        problems = []
        for name in linears:
            # transformers leaves out modules of these names, and those inside or below a module of these names
            skipped = any(name == part or name.startswith(f"{part}.") or f".{part}" in f".{name}" for part in self.skipped)
            if (name in self.modules) == skipped:
                how, named = ("packed", "names") if skipped else ("not packed", "does not name")
                problems.append(f"{name} is {how}, but quantization_config.llm_int8_skip_modules {named} it")
        return problems

    def _shape(self, module: str) -> tuple[int, int]:
        """(out, in)."""
        if self.nf4:
            return self._packed[module].shape
        shape = self._stored.shape(module + ".weight")
        if len(shape) != 2 or self._stored.dtype(module + ".weight") != "I8":
            raise UserError(f"{self._stored.file(module + '.weight')}: {module}.weight is no matrix of I8 codes; export again")
        return shape[0], shape[1]

    def _description(self, module: str) -> _Packed:
        """Raises UserError if the description is not of NF4, or does not fit the sizes of the tensors."""
        name = module + _STATE
        file = self._stored.file(name)
        try:
            if self._stored.dtype(name) != "U8" or len(self._stored.shape(name)) != 1:
                raise ValueError("its tensor is not a row of bytes")
            told: Any = json.loads(self._stored.integers(name).tobytes().decode("utf-8"))
            kind, block, shape = told["quant_type"], told["blocksize"], told["shape"]
            if kind != "nf4" or type(block) is not int or block not in _BLOCKS:
                raise ValueError(f"quant_type {kind!r:.50} in blocks of {block!r:.50}")
            rows, columns = shape
            if not all(type(size) is int and size > 0 for size in (rows, columns)) or columns % block:
                raise ValueError(f"shape {shape!r:.100} has rows that blocks of {block} do not divide")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{file}: {name} does not describe NF4 codes ({error}); export again") from error
        self._stored.expect(module + ".weight", ("U8",), (rows * columns // 2, 1))
        self._stored.expect(module + _ABSMAX, ("F32",), (rows * columns // block,))
        self._stored.expect(module + _MAP, ("F32",), (16,))
        if not np.array_equal(self._stored.floats(module + _MAP), np.array(_TABLE, np.float32)):
            raise UserError(f"{file}: {module + _MAP} is not the table of NF4; export again")
        return _Packed((rows, columns), block)


def read_bitsandbytes_config(folder: Path) -> tuple[bool, float, tuple[str, ...]]:
    """(whether the weights are NF4, threshold of outliers in int8, modules that are not packed) of ``config.json``.

    Raises:
        UserError: the folder is not a bitsandbytes export, or one that this reader does not know; the message names the field.
    """
    file, quantization = read_quantization(folder)
    nf4 = quantization.get("load_in_4bit", False)
    check_fields(file, [("quant_method", quantization.get("quant_method"), ("bitsandbytes",)), ("load_in_4bit", nf4, (True, False))])
    check_fields(file, [("load_in_8bit", quantization.get("load_in_8bit", not nf4), (not nf4,))])
    threshold = quantization.get("llm_int8_threshold", 6.0)
    if nf4:
        check_fields(
            file,
            [
                ("bnb_4bit_quant_type", quantization.get("bnb_4bit_quant_type"), ("nf4",)),
                ("bnb_4bit_use_double_quant", quantization.get("bnb_4bit_use_double_quant", False), (False,)),
                ("bnb_4bit_quant_storage", quantization.get("bnb_4bit_quant_storage", "uint8"), ("uint8",)),
            ],
        )
    elif type(threshold) not in (int, float) or not 0 <= threshold < float("inf"):
        raise UserError(f"{file}: quantization_config: llm_int8_threshold is {threshold!r:.100}; it must be a number of at least 0")
    skipped = check_module_names(file, "llm_int8_skip_modules", quantization.get("llm_int8_skip_modules") or [])
    return nf4, 0.0 if nf4 else float(threshold), skipped
