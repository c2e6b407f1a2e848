"""Decodes the codes of ternary blocks of 256 weights, TQ1_0 and TQ2_0; it shares no code with the writer.

Source: ggml ``ggml-quants.c`` (dequantize_row_tq1_0, dequantize_row_tq2_0).
"""

import numpy as np
from numpy.typing import NDArray

TERNARY_TYPES = ("TQ1_0", "TQ2_0")
_AT = np.arange(256)
"""Number of each element in its block."""


def ternary_fields(form: str, packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Decode the bytes before the scale, uint8 [blocks, 52 or 64], into one number per weight, int8 [blocks, 256]: 1 means zero."""
    if form == "TQ2_0":
        # two bits each, so damaged files may hold 3
        return (packed[:, 32 * (_AT // 128) + _AT % 32] >> (2 * (_AT % 128 // 32)).astype(np.uint8) & np.uint8(3)).astype(np.int8)
    # the byte of each element and the place of its digit
    later, last = _AT >= 160, _AT >= 240
    byte = np.select([last, later], [48 + (_AT - 240) % 4, 32 + (_AT - 160) % 16], _AT % 32)
    place = np.select([last, later], [(_AT - 240) // 4, (_AT - 160) // 16], _AT // 32)
    # a byte is a fraction of 256 in base 3: its digit k is the whole part of 3 times what is left of it after k digits
    left = packed[:, byte].astype(np.int64) * 3**place % 256
    return (left * 3 // 256).astype(np.int8)
