"""An oracle written without torch: one weight at a time, grid values looked up in a table, ties decided with fractions."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from decoct.qat.spec import QuantSpec

Oracle = Callable[..., tuple[Tensor, ...]]


def _table(dtype: str) -> np.ndarray:
    """All positive finite values of a 16-bit dtype, as fp64, in the order of their bits."""
    if dtype == "bf16":
        return (np.arange(1, 0x7F80, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)


def _nearest(table: np.ndarray, value: float) -> float:
    """The entry nearest to ``value``; on a tie the one with even bits (entry i has bits i + 1)."""
    i = int(np.searchsorted(table, value))
    candidates = [j for j in (i - 1, i) if 0 <= j < len(table)]
    best = min(candidates, key=lambda j: (abs(Fraction(table[j]) - Fraction(value)), (j + 1) % 2))
    return float(table[best])


def _scale(absmax: np.float32, spec: QuantSpec) -> np.float32:
    if absmax == 0:
        return np.float32(1)
    scale = float(np.float32(absmax) / np.float32(spec.divisor_value))
    low, high = {
        "bf16_fp16": (2.0**-17, 65280.0),
        "bf16": (2.0**-126, 3.3895313892515355e38),
        "fp16": (2.0**-14, 65504.0),
        "fp32": (2.0**-126, 3.4028234663852886e38),
    }[spec.scale_grid]
    scale = min(max(scale, low), high)
    if spec.scale_grid != "fp32":
        scale = _nearest(_table("fp16" if spec.scale_grid == "fp16" else "bf16"), scale)
    return np.float32(scale)


def _oracle(weight: Tensor, spec: QuantSpec, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes int8, scales fp32 [out, groups], values fp32, where the gradient passes bool), element by element."""
    rows, columns = weight.shape
    width = columns if spec.group_size == "channel" else int(spec.group_size)
    w = weight.float().numpy() * (1 if mask is None else mask.numpy())
    codes, passes = np.zeros((rows, columns), np.int8), np.zeros((rows, columns), bool)
    scales, values = np.zeros((rows, columns // width), np.float32), np.zeros((rows, columns), np.float32)
    low, high = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
    for r in range(rows):
        for g in range(columns // width):
            group = [np.float32(w[r, c]) for c in range(g * width, (g + 1) * width)]
            scales[r, g] = scale = _scale(max(abs(x) for x in group), spec)
            for c, x in enumerate(group, g * width):
                v = np.float32(x) / scale
                # Python rounds fractions half to even
                codes[r, c] = code = min(max(round(Fraction(float(v))), low), high)
                values[r, c] = np.float32(code) * scale
                passes[r, c] = low <= v <= high and (mask is None or bool(mask[r, c]))
    return torch.from_numpy(codes), torch.from_numpy(scales), torch.from_numpy(values), torch.from_numpy(passes)


@pytest.fixture
def oracle() -> Oracle:
    return _oracle


def _lsq_oracle(
    weight: Tensor, rounded: Tensor, spec: QuantSpec, upstream: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dL/dw, dL/dscale, sum of the absolute terms of the latter), all fp64: LSQ's formulas, group by group."""
    width = spec.group_width(weight.shape[1])
    kept = (weight.float() if mask is None else weight.float() * mask).reshape(*rounded.shape, width)
    # what the division in fp32 says decides; the terms are fp64
    value32 = kept / rounded.unsqueeze(-1)
    value = kept.double() / rounded.double().unsqueeze(-1)
    inside = (value32 >= spec.qmin) & (value32 <= spec.qmax)
    step = torch.where(inside, value32.round().double() - value, value32.double().clamp(spec.qmin, spec.qmax))
    terms = step * upstream.double().reshape(step.shape) / math.sqrt(width * spec.qmax)
    if mask is not None:
        inside &= mask.reshape(inside.shape)
    return upstream.double() * inside.reshape(weight.shape), terms.sum(-1), terms.abs().sum(-1)


@pytest.fixture
def lsq_oracle() -> Oracle:
    return _lsq_oracle


def _same_bits(name: str, got: Tensor, expected: Tensor) -> None:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
    # which NaN is written is nobody's business
    differs = (got.view(integers) != expected.view(integers)) & ~(got.isnan() & expected.isnan())
    worst = (got.double() - expected.double()).abs().nan_to_num().max() if got.numel() else 0.0
    assert not differs.any(), f"{name} {tuple(got.shape)}: {int(differs.sum())} elements differ, by {worst:.3e} at most"


@pytest.fixture
def same_bits() -> Callable[[str, Tensor, Tensor], None]:
    """``same_bits(name, got, expected)``: AssertionError unless shapes, dtypes and bits are equal (any NaN equals any)."""
    return _same_bits


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (integers: -77), so that an element nobody wrote is seen."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def filled(*args: object, _original: Callable[..., Tensor] = original, **kwargs: object) -> Tensor:
            made = _original(*args, **kwargs)
            return made.fill_(float("nan") if made.is_floating_point() else 77)

        monkeypatch.setattr(torch, name, filled)
