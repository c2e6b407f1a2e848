"""An independent reader of AWQ folders (version "gemm"), in numpy.

Per quantized module P, with unsigned 4-bit codes u = q + 8: ``P.qweight`` int32 [in, out / 8], packed along the outputs; ``P.qzeros``
int32 [groups, out / 8], packed alike, holding z; ``P.scales`` fp16 [groups, out]. w = (u - z) * s. The eight fields of a word, lowest
first, hold columns 0, 2, 4, 6, 1, 3, 5, 7. Source: AutoAWQ ``modules/linear/gemm.py``, ``utils/packing_utils.py``.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .fields import check_fields, check_group, check_module_names, read_quantization
from .qweight import QWEIGHT, QZEROS, SCALES, QweightFolder
from .tensors import StoredCodes, StoredScheme, bit_fields

# The inverse of the order above: column 1 is in field 4, column 2 in field 1, and so on (AutoAWQ's AWQ_REVERSE_ORDER).
_FIELD_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


class AwqFolder(QweightFolder):
    """An opened AWQ export: its tensors by name, each as fp32."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if config, index or a file header is missing, damaged or foreign."""
        super().__init__(folder)
        self._scheme, self.ignore = read_awq_scheme(self.folder)

    def scheme_of(self, module: str) -> StoredScheme:
        """Bits and group size, the same for all modules. Zero points are always stored, also for symmetric weights."""
        return self._scheme

    def unlisted(self, linears: tuple[str, ...]) -> list[str]:
        """Sentences about linears for which tensors and config (its patterns are parts of names) disagree on whether they are packed."""
        problems = []
        for name in linears:
            # runtimes never read the head as packed
            skipped = name == "lm_head" or any(part in name for part in self.ignore)
            if name not in self.modules and not skipped:
                problems.append(f"{name} is not packed, but quantization_config.modules_to_not_convert does not name it")
            if name in self.modules and skipped:
                problems.append(f"{name} is packed, but quantization_config.modules_to_not_convert leaves it out")
        return problems

    def stored_codes(self, module: str) -> StoredCodes:
        """Codes, scales and zero points of a packed module.

        Raises:
            UserError: shapes or dtypes do not fit, or a scale is not finite and positive.
        """
        rows, columns = self._shape(module)
        width = self._group_width(module, columns, self._scheme)
        groups = columns // width
        self._stored.expect(module + QZEROS, ("I32",), (groups, rows // 8))
        # [groups, out] -> [out, groups]
        scales = self._stored.scales(module + SCALES, (groups, rows)).T
        # both shifts cancel: (u - 8) - (z - 8) = u - z
        return StoredCodes(codes=self._nibbles(module + QWEIGHT) - 8, scales=scales, zeros=self._nibbles(module + QZEROS) - 8)

    def _shape(self, module: str) -> tuple[int, int]:
        """(out, in)."""
        columns, words = self._stored.matrix(module + QWEIGHT)
        return words * 8, columns

    def _nibbles(self, name: str) -> NDArray[np.int16]:
        """Unsigned [out, rows] of a tensor int32 [rows, out / 8]."""
        data = self._stored.words(name)
        # [rows, out / 2] bytes -> [rows, out] fields -> [rows, out / 8, 8], reordered within each word -> [out, rows]
        fields, _ = bit_fields(data, 4, data.shape[1] * 2)
        return fields.reshape(len(data), -1, 8)[:, :, _FIELD_OF_COLUMN].reshape(len(data), -1).T


def read_awq_scheme(folder: Path) -> tuple[StoredScheme, tuple[str, ...]]:
    """(scheme, parts of names that are not packed) of ``config.json``.

    Raises:
        UserError: the folder is not an AWQ export, or one that this reader does not know; the message names the field.
    """
    file, quantization = read_quantization(folder)
    # older tools name the same fields w_bit and q_group_size
    named: dict[str, Any] = {"bits": quantization.get("w_bit"), "group_size": quantization.get("q_group_size"), **quantization}
    version = named.get("version", "gemm")
    expected: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("quant_method", named.get("quant_method"), ("awq",)),
        ("bits", named["bits"], (4,)),
        ("version", version.lower() if isinstance(version, str) else version, ("gemm",)),
        ("zero_point", named.get("zero_point", True), (True,)),
    ]
    check_fields(file, expected)
    check_group(file, named["group_size"])
    ignore = check_module_names(file, "modules_to_not_convert", named.get("modules_to_not_convert") or [])
    size = named["group_size"]
    return StoredScheme(bits=4, group_size=None if size == -1 else size, symmetric=False), ignore
