"""Checks of codes and scales against their spec: shapes, dtypes, ranges, grids."""

import torch
from torch import Tensor

from ..fake_quant import Encoded
from ..fake_quant.absmax_reference import GRID_DTYPES
from ..spec import QuantSpec
from ..super_blocks import SUPER_BLOCKS
from .sub_scale_checks import fp16_or_nan, sub_problem

_CODE_DTYPES = {"int": torch.int8, "fp8_e4m3": torch.float8_e4m3fn, **dict.fromkeys(SUPER_BLOCKS, torch.int8)}
"""Kind -> dtype of its codes; the other kinds use uint8, one 4-bit code per byte."""
_OWN_GRIDS = ("mxfp4", "nvfp4", *SUPER_BLOCKS)


def grid_problem(encoded: Encoded, spec: QuantSpec) -> str | None:
    """Return why these tensors are not valid codes and scales of ``spec``; None if they are."""
    problem = _codes_problem(encoded.codes, encoded.scales, spec) or _zero_problem(encoded.zeros, encoded.scales, spec)
    return problem or _global_problem(encoded.global_scale, spec) or sub_problem(encoded.codes, encoded.sub, spec)


def _zero_problem(zeros: Tensor | None, scales: Tensor, spec: QuantSpec) -> str | None:
    if spec.symmetric:
        return None if zeros is None else "zero points are stored for a symmetric spec"
    if zeros is None:
        return "zero points of an asymmetric spec are missing"
    if zeros.dtype != torch.int8 or zeros.shape != scales.shape:
        return f"zero points are {zeros.dtype} of shape {tuple(zeros.shape)}, not int8 of shape {tuple(scales.shape)}"
    # min and max of an empty tensor are errors
    if zeros.numel() and not spec.qmin <= int(zeros.min()) <= int(zeros.max()) <= spec.qmax:
        return f"zero points span {int(zeros.min())}..{int(zeros.max())}, outside {spec.qmin}..{spec.qmax}"
    return None


def _global_problem(whole: Tensor | None, spec: QuantSpec) -> str | None:
    # only nvfp4 has a scale above those of its groups
    if (whole is not None) != (spec.kind == "nvfp4"):
        return f"a global scale is {'stored' if whole is not None else 'missing'}, kind is {spec.kind}"
    if whole is None:
        return None
    fits = whole.dtype == torch.float32 and tuple(whole.shape) == (1,) and float(whole) > 0 and bool(torch.isfinite(whole).all())
    return None if fits else f"its global scale is {whole.dtype} of shape {tuple(whole.shape)}, not one positive finite fp32 number"


def _codes_problem(codes: Tensor, scales: Tensor, spec: QuantSpec) -> str | None:
    """Return why ``codes`` or ``scales`` do not fit ``spec``; None if they do."""
    dtype = _CODE_DTYPES.get(spec.kind, torch.uint8)
    if codes.dtype != dtype or codes.ndim != 2:
        return f"codes are {codes.dtype} of shape {tuple(codes.shape)}, not {_a(dtype)} matrix"
    try:
        expected = spec.scale_shape(*codes.shape)
    except ValueError as error:
        return str(error)
    if scales.dtype != torch.float32 or tuple(scales.shape) != expected:
        return f"scales are {scales.dtype} of shape {tuple(scales.shape)}, not float32 of shape {expected}"
    if outside := _outside(codes, spec):
        return outside
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        return "a scale is not a positive finite number"
    # exporters cast scales to fp16 or bf16 unrounded, which only the grid makes exact (law 3, docs/architecture.md)
    if not torch.equal(_on_grid(scales, spec), scales):
        return f"a scale is not on the grid {spec.kind if spec.kind in _OWN_GRIDS else spec.scale_grid}"
    return None


def _a(dtype: torch.dtype) -> str:
    word = str(dtype).removeprefix("torch.")
    return f"an {word}" if word.startswith("i") else f"a {word}"


def _on_grid(scales: Tensor, spec: QuantSpec) -> Tensor:
    """Round scales to values the kind can store. For powers of two, any other number becomes NaN, which equals nothing."""
    if spec.kind == "nvfp4":
        # clamped, because the cast of a number above e4m3's range gives NaN
        return scales.clamp(max=448.0).to(torch.float8_e4m3fn).to(torch.float32)
    if spec.kind == "mxfp4":
        # frexp gives mantissas in [0.5, 1): exactly 0.5 means a power of two
        return torch.where(torch.frexp(scales).mantissa == 0.5, scales, torch.nan)
    if spec.super_block:
        return fp16_or_nan(scales)
    grid = spec.grid
    return scales.to(GRID_DTYPES[grid.dropped_bits]).to(torch.float32).clamp(grid.smallest, grid.largest)


def _outside(codes: Tensor, spec: QuantSpec) -> str | None:
    if spec.kind == "fp8_e4m3":
        # e4m3fn has no infinities, so NaN is its only bit pattern that is not a number
        return None if bool(torch.isfinite(codes.to(torch.float32)).all()) else "a code is NaN"
    low, high = (spec.qmin, spec.qmax) if spec.kind == "int" or spec.super_block else (0, 15)
    if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high:
        return f"codes span {int(codes.min())}..{int(codes.max())}, outside {low}..{high}"
    return None
