"""Decodes MXFP4 blocks of 32 weights; it shares no code with the writer.

Source: ggml ``ggml-common.h`` (kvalues_mxfp4), ``ggml-impl.h`` (ggml_e8m0_to_fp32_half).
"""

import numpy as np
from numpy.typing import NDArray

_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""Twice the 4-bit floats, by code."""


def decode_mxfp4(blocks: NDArray[np.uint8]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Decode uint8 [blocks, 17]: (twice the floats int8 [blocks, 32], half the scales fp32 [blocks, 1], NaN for the exponent 255)."""
    fields = np.concatenate([blocks[:, 1:] % 16, blocks[:, 1:] // 16], axis=1)
    exponents = blocks[:, :1].astype(np.int32)
    # 2^(e - 128), subnormal for e of 0 and 1
    scales = np.ldexp(np.float32(1), exponents - 128).astype(np.float32)
    return _TWICE[fields], np.where(exponents == 255, np.float32(np.nan), scales)
