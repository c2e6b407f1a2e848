"""The K-quants of ggml as lattices: super-blocks of 256 weights, whose sub-blocks have small integer scales under fp16 numbers.

    kinds with minimums     w = (d * sc) * u - (dmin * m)    u, sc and m not negative
    the others              w = (d * sc) * q                 q and sc signed

    kind    codes      weights per sub-block   sc           m        bytes per super-block   bits per weight
    q2_k    0..3       16                      0..15        0..15     84                     2.625
    q3_k    -4..3      16                      -32..31      -        110                     3.4375
    q4_k    0..15      32                      0..63        0..63    144                     4.5
    q5_k    0..31      32                      0..63        0..63    176                     5.5
    q6_k    -32..31    16                      -128..127    -        210                     6.5625

d and dmin are fp16 numbers, one per super-block. Products of d, sc and a code have at most 23 significant bits, so in fp32 they are exact;
the difference of the two products is rounded once, on every machine alike.

Source: ggml ``ggml-common.h`` (block_q2_K to block_q6_K), ``ggml-quants.c`` (dequantize_row_*).
"""

from dataclasses import dataclass

WIDTH = 256
"""Weights per super-block, consecutive inputs of one row."""


@dataclass(frozen=True, kw_only=True)
class SuperBlock:
    """The layout of a kind."""

    bits: int
    """Width of a code."""
    width: int
    """Weights per sub-block."""
    most: int
    """Largest sub-scale that rounding gives, and the largest sub-minimum; the smallest is 1, or ``-most`` where scales have a sign."""
    least: int
    """Smallest sub-scale that the format holds."""
    minimum: bool
    """Whether sub-blocks have minimums, and codes no sign."""
    nbytes: int
    """Bytes of a super-block."""
    fallback: dict[str, object]
    """Fields of a spec for rows that are no multiple of 256: the blocks of llama.cpp's own fallback, or the next that hold signed codes."""

    @property
    def codes(self) -> tuple[int, int]:
        """Smallest and largest code."""
        half = 1 << (self.bits - 1)
        return (0, 2 * half - 1) if self.minimum else (-half, half - 1)


_Q4_0 = {"kind": "int", "bits": 4, "group_size": 32}
_Q5_0 = {"kind": "int", "bits": 5, "group_size": 32}
_Q8_0 = {"kind": "int", "bits": 8, "group_size": 32}

SUPER_BLOCKS: dict[str, SuperBlock] = {
    "q2_k": SuperBlock(bits=2, width=16, most=15, least=0, minimum=True, nbytes=84, fallback=_Q4_0),
    "q3_k": SuperBlock(bits=3, width=16, most=31, least=-32, minimum=False, nbytes=110, fallback=_Q4_0),
    "q4_k": SuperBlock(bits=4, width=32, most=63, least=0, minimum=True, nbytes=144, fallback=_Q5_0),
    "q5_k": SuperBlock(bits=5, width=32, most=63, least=0, minimum=True, nbytes=176, fallback=_Q8_0),
    "q6_k": SuperBlock(bits=6, width=16, most=127, least=-128, minimum=False, nbytes=210, fallback=_Q8_0),
}
"""Kind -> its layout."""


def no_zero(kind: str) -> str:
    """Say why pruned weights cannot have a kind with minimums, and what they can have: the same words wherever they meet."""
    return f"kind={kind!r} has minimums, so pruned weights would not stay zero; use q3_k or q6_k, or kind: int"
