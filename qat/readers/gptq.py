"""An independent reader of GPTQ folders (``checkpoint_format`` "gptq" and "gptq_v2"), in numpy.

Per quantized module P, with b bits and unsigned codes u = q + 2^(b-1): ``P.qweight`` int32 [in b / 32, out], packed along the inputs;
``P.qzeros`` int32 [groups, out b / 32], packed along the outputs, holding z - 1 in version 1 and z in version 2; ``P.scales`` fp16
[groups, out]; ``P.g_idx`` int32 [in], the group of each input. w = (u - z) * s.
Source: GPTQModel ``nn_modules/qlinear/__init__.py``, ``quantization/config.py``.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.common.errors import UserError
from .fields import BITS, check_fields, check_group, module_pattern, read_quantization
from .qweight import QWEIGHT, QZEROS, SCALES, QweightFolder
from .tensors import StoredCodes, StoredScheme, bit_fields, read_config

_G_IDX = ".g_idx"


class GptqFolder(QweightFolder):
    """An opened GPTQ export: its tensors by name, each as fp32."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if config, index or a file header is missing, damaged or foreign."""
        super().__init__(folder, (_G_IDX,))
        self.format, self._scheme, self._dynamic = read_gptq_scheme(self.folder)

    def scheme_of(self, module: str) -> StoredScheme:
        """Bits and group size of a module: those of the config, changed by the first ``dynamic`` pattern that matches the module."""
        changes = next((change for pattern, change in self._dynamic if pattern.match(module)), None) or {}
        # what a pattern does not change is as in the rest of the config; -1 means one group of all inputs
        bits, size = changes.get("bits", self._scheme.bits), changes.get("group_size", self._scheme.group_size or -1)
        return StoredScheme(bits=bits, group_size=None if size == -1 else size, symmetric=changes.get("sym", self._scheme.symmetric))

    def unlisted(self, linears: tuple[str, ...]) -> list[str]:
        """Sentences about linears for which tensors and config disagree on whether they are packed."""
        # runtimes read the head as packed only if 'lm_head' is true; the patterns are for the decoder's layers
        head = bool(read_config(self.folder)["quantization_config"].get("lm_head"))
        problems = []
        for name in linears:
            skipped = any(pattern.match(name) and change is None for pattern, change in self._dynamic) or (name == "lm_head" and not head)
            if name not in self.modules and not skipped:
                problems.append(f"{name} is not packed, but no pattern of quantization_config.dynamic leaves it out")
            if name in self.modules and skipped:
                problems.append(f"{name} is packed, but quantization_config leaves it out")
        return problems

    def stored_codes(self, module: str) -> StoredCodes:
        """Codes, scales and zero points of a packed module.

        Raises:
            UserError: shapes or dtypes do not fit, a scale is not finite and positive, inputs are reordered, unused bits are set, or
                zero points are those of asymmetric weights although the config states symmetric.
        """
        (rows, columns), scheme = self._shape(module), self.scheme_of(module)
        width = self._group_width(module, columns, scheme)
        half, groups = 1 << (scheme.bits - 1), columns // width
        # [out, in], unsigned
        codes = self._fields(module + QWEIGHT, scheme.bits, columns, transposed=True)
        self._stored.expect(module + QZEROS, ("I32",), (groups, -(-rows * scheme.bits // 32)))
        # version 1 stores z - 1, and its readers add 1 within the width of the field: z = 0 would become 2^b, so it cannot be stored
        zeros = self._fields(module + QZEROS, scheme.bits, rows, transposed=False).T + (self.format == "gptq")
        if scheme.symmetric and (zeros != half).any():
            raise UserError(
                f"{self._stored.file(module + QZEROS)}: {module}{QZEROS} holds other zero points than {half}, but sym is true; the file "
                "is damaged, or has the other checkpoint_format (gptq stores zero points minus one, gptq_v2 stores them unchanged)"
            )
        self._check_order(module, columns, width)
        # [groups, out] -> [out, groups]
        scales = self._stored.scales(module + SCALES, (groups, rows)).T
        # both shifts cancel: (u - half) - (z - half) = u - z
        return StoredCodes(codes=codes - half, scales=scales, zeros=zeros - half)

    def _shape(self, module: str) -> tuple[int, int]:
        """(out, in): outputs as stored, inputs from ``g_idx``, or else as many as the words hold."""
        name, bits = module + QWEIGHT, self.scheme_of(module).bits
        words, rows = self._stored.matrix(name)
        order = module + _G_IDX
        columns = self._stored.shape(order)[0] if order in self._stored and self._stored.shape(order) else words * 32 // bits
        self._stored.expect(name, ("I32",), (-(-columns * bits // 32), rows))
        return rows, columns

    def _fields(self, name: str, bits: int, count: int, *, transposed: bool) -> NDArray[np.int16]:
        data = self._stored.words(name)
        if transposed:  # [words, out] -> [out, words], each word's bytes kept together
            data = data.reshape(data.shape[0], -1, 4).transpose(1, 0, 2).reshape(data.shape[1] // 4, -1)
        numbers, more = bit_fields(data, bits, count)
        if more:
            raise UserError(f"{self._stored.file(name)}: {name} has bits set after its last field; the file is damaged, export again")
        return numbers

    def _check_order(self, module: str, columns: int, width: int) -> None:
        name = module + _G_IDX
        if name not in self._stored:
            return
        self._stored.expect(name, ("I32",), (columns,))
        # with desc_act a group may be any set of inputs; without, it is a range of them
        if not np.array_equal(self._stored.integers(name), np.arange(columns) // width):
            raise UserError(f"{self._stored.file(name)}: {name} reorders inputs (desc_act), which this reader does not know")


def read_gptq_scheme(folder: Path) -> tuple[str, StoredScheme, list[tuple[re.Pattern[str], dict[str, Any] | None]]]:
    """(checkpoint format, scheme, ``dynamic`` as (pattern, changes; None = not quantized)) of ``config.json``.

    Raises:
        UserError: the folder is not a GPTQ export, or one that this reader does not know; the message names the field.
    """
    file, quantization = read_quantization(folder)
    expected: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("quant_method", quantization.get("quant_method"), ("gptq",)),
        ("checkpoint_format", quantization.get("checkpoint_format", "gptq"), ("gptq", "gptq_v2")),
        ("bits", quantization.get("bits"), BITS),
        ("sym", quantization.get("sym", True), (True, False)),
        ("desc_act", quantization.get("desc_act", False), (False,)),
        ("pack_dtype", quantization.get("pack_dtype", "int32"), ("int32",)),
    ]
    check_fields(file, expected)
    size = quantization.get("group_size")
    check_group(file, size)
    dynamic = quantization.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise UserError(f"{file}: quantization_config: dynamic must map patterns to changes")
    scheme = StoredScheme(bits=quantization["bits"], group_size=None if size == -1 else size, symmetric=quantization.get("sym", True))
    return quantization.get("checkpoint_format", "gptq"), scheme, [_rule(file, key, change) for key, change in dynamic.items()]


def _rule(file: Path, key: str, change: Any) -> tuple[re.Pattern[str], dict[str, Any] | None]:
    """One entry of ``dynamic``: '-:pattern' leaves modules out, '+:pattern' or 'pattern' changes their settings."""
    if not isinstance(change, dict):
        raise UserError(f"{file}: quantization_config: dynamic[{key!r:.100}] must be an object")
    # the prefix decides what the pattern does; without one it changes settings, as with "+:"
    compiled = module_pattern(file, "dynamic", key.removeprefix("+:").removeprefix("-:"))
    if key.startswith("-:"):
        return compiled, None
    # the defaults stand for what the entry leaves as it is, and pass
    check_fields(file, [("dynamic bits", change.get("bits", 4), BITS), ("dynamic sym", change.get("sym", True), (True, False))])
    check_group(file, change.get("group_size", -1))
    return compiled, change
