"""What the fake-quant kernels share: reading and writing numbers, rounding by integer arithmetic, and the launch over groups.

Every kernel gives bit for bit what its ``*_reference.py`` computes, on a GPU and in Triton's interpreter (``TRITON_INTERPRET=1``), because
- division is ``div_rn`` (``/`` may be approximate in fp32);
- rounding half to even is the magic-number add after the clamp (``libdevice.rint`` does not run in the interpreter);
- bf16 travels as int16 and is cast by integer arithmetic, as is the scale to its grid (the interpreter's own bf16 casts
  truncate and lose subnormal numbers);
- extremes are taken over integers: fp32 magnitudes order as their bits do, NaN and infinity on top;
- the backward recomputes scale and clip mask from the weight, by the same code.

The matrix [out, in] is seen as [out * in / width groups, width]; a program handles a block of whole groups, in column
blocks when a group is wider than one block. No atomics: results do not depend on scheduling.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .absmax_reference import code_limits

# Elements a program holds at a time: 16 per thread of 4 warps, so that a program's tile stays in registers.
TILE_ELEMENTS = 2048
# A group wider than this is walked in column blocks.
MAX_BLOCK_WIDTH = 2048
# The bits of fp32 infinity; those of NaN are larger.
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def drop_bits(x, DROPPED_BITS: tl.constexpr):
    """fp32 -> fp32 without its last mantissa bits, round half to even; x finite, and no subnormal of the target type."""
    bits = x.to(tl.int32, bitcast=True)
    # half to even on the bit pattern: just under half of the dropped part, plus 1 if the kept part is odd. A carry out of the mantissa
    # raises the exponent, which is the right result
    odd = (bits >> DROPPED_BITS) & 1
    bits = ((bits + ((1 << (DROPPED_BITS - 1)) - 1) + odd) >> DROPPED_BITS) << DROPPED_BITS
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def from_memory(raw):
    """fp32 of loaded fp32, fp16 or, as int16, bf16 numbers; exact."""
    if raw.dtype == tl.int16:
        # bf16 is the upper half of an fp32
        x = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = raw.to(tl.float32)
    return x


@triton.jit
def to_memory(x, dtype: tl.constexpr):
    """fp32 -> what is stored; for bf16 (int16) the number must be one of bf16 already."""
    if dtype == tl.int16:
        # the lower half is zero already (``drop_bits``)
        raw = (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
    else:
        raw = x.to(dtype)
    return raw


@triton.jit
def masked_weights(weight_ptr, mask_ptr, offsets, valid, HAS_MASK: tl.constexpr):
    """fp32 [groups, columns] of w * mask, and the mask as 0/1 (all 1 without one)."""
    x = from_memory(tl.load(weight_ptr + offsets, mask=valid, other=0))
    keep = tl.full(x.shape, 1.0, tl.float32)
    if HAS_MASK:
        keep = tl.load(mask_ptr + offsets, mask=valid, other=0).to(tl.float32)
        # a product, not a select: NaN stays NaN under a mask of 0, as in the reference
        x = x * keep
    return x, keep


@triton.jit
def finite(x):
    """Whether fp32 numbers are neither NaN nor infinite."""
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < INFINITY_BITS


@triton.jit
def nearest_integers(value, low, high):
    """fp32 integers in [low, high]: clamp, then round half to even by adding 1.5 * 2^23, where fp32 numbers are 1 apart; never -0."""
    # clamped first: the magic number works for magnitudes up to 2^22 only
    clipped = tl.minimum(tl.maximum(value, low), high)
    return (clipped + 12582912.0) - 12582912.0


def operands(weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Contiguous weight and mask bytes; without a mask the weight stands in for the pointer that is never read."""
    weight = weight.contiguous()
    return weight, weight if mask is None else mask.contiguous().view(torch.uint8)


def launch_kernel(kernel, tensors: list[Tensor], like: Tensor, width: int, numbers: tuple[float, ...] = (), **constants: object) -> None:
    """Run ``kernel`` over all groups of ``like``, on its device.

    Args:
        kernel: Takes the pointers of ``tensors``, the number of groups, ``numbers``, and as constants WIDTH, BLOCK_GROUPS, BLOCK_WIDTH
            and ``constants``.
        tensors: Contiguous; bf16 ones are passed as int16.
        like: The weight [out, in].
        width: Weights per group.
        numbers: Arguments that are no constants.
        constants: Its other constants, by name.
    """
    num_groups = like.numel() // width
    if num_groups == 0:
        return
    # Triton's ranges have powers of two as lengths; what a group does not fill is masked
    block_width = min(triton.next_power_of_2(width), MAX_BLOCK_WIDTH)
    # narrow groups share a program, so that every program has about TILE_ELEMENTS numbers
    block_groups = max(1, TILE_ELEMENTS // block_width)
    # Triton launches on the current device, which need not be that of the tensors
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        kernel[(triton.cdiv(num_groups, block_groups),)](
            *(t.view(torch.int16) if t.dtype == torch.bfloat16 else t for t in tensors),
            num_groups,
            *numbers,
            WIDTH=width,
            BLOCK_GROUPS=block_groups,
            BLOCK_WIDTH=block_width,
            **constants,
        )


def integer_grid(bits: int, grid: list[float]) -> dict[str, float]:
    """Constants of kernels that round to integers of ``bits``, with scales on ``grid`` (see ``dispatch.grid_numbers``)."""
    least, most = code_limits(bits)
    return {"QMIN": float(least), "QMAX": float(most), "DROPPED_BITS": int(grid[0]), "SMALLEST": grid[1], "LARGEST": grid[2]}


def runs_on(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of ``device``: CUDA, or the CPU when they were loaded for the interpreter."""
    # with TRITON_INTERPRET=1, triton.jit returns something other than a JITFunction
    interpreted = not isinstance(nearest_integers, triton.JITFunction)
    return device.type == "cuda" or (interpreted and device.type == "cpu")
