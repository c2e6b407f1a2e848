"""QuantSpec: the one description of a weight lattice that drives reference, kernel, training, packing and export.

Symbols: b bits, q signed code in [-2^(b-1), 2^(b-1)-1], s scale, g group size along the input axis. w ~ q * s.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Divisor = Literal["half_range", "qmax", "full_range"]
ScaleGrid = Literal["bf16_fp16", "bf16", "fp16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class GridLimits:
    """The numbers behind a scale grid: fp32 with its last mantissa bits dropped (round half to even), then clamped."""

    dropped_bits: int
    """fp32 mantissa bits that a scale may not use: 16 leaves bf16's, 13 leaves fp16's, 0 leaves all."""
    smallest: float
    """Smallest scale (itself on the grid; the smallest normal number, or for bf16_fp16 the smallest exact in fp16 too)."""
    largest: float
    """Largest scale (itself on the grid)."""


SCALE_GRIDS: dict[str, GridLimits] = {
    "bf16_fp16": GridLimits(dropped_bits=16, smallest=2.0**-17, largest=65280.0),
    "bf16": GridLimits(dropped_bits=16, smallest=2.0**-126, largest=(2.0 - 2.0**-7) * 2.0**127),
    "fp16": GridLimits(dropped_bits=13, smallest=2.0**-14, largest=65504.0),
    "fp32": GridLimits(dropped_bits=0, smallest=2.0**-126, largest=(2.0 - 2.0**-23) * 2.0**127),
}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Symmetric integer lattice of linear weights [out, in], one scale per group of ``group_size`` inputs or per row."""

    bits: int = 4
    """Width of a code, 2 to 8."""
    group_size: int | Literal["channel"] = 128
    """Consecutive input elements that share a scale; 'channel' = the whole row."""
    symmetric: bool = True
    """Zero is code 0 and there is no zero point."""
    divisor: Divisor = "half_range"
    """absmax -> scale: half_range (2^b - 1) / 2, qmax 2^(b-1) - 1, full_range 2^(b-1)."""
    scale_grid: ScaleGrid = "bf16_fp16"
    """Values a scale may take: bf16_fp16 = bf16 clamped to [2^-17, 65280], exact in bf16 and in fp16."""

    def __post_init__(self) -> None:
        if not _is_int(self.bits):
            raise ValueError(f"bits={self.bits!r} is not a whole number; use 2 to 8")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} is outside 2..8; 4 and 8 are what serving stacks read")
        if self.group_size != "channel":
            if not _is_int(self.group_size):
                raise ValueError(f"group_size={self.group_size!r} is neither a whole number nor 'channel'")
            if int(self.group_size) < 1:
                raise ValueError(f"group_size={self.group_size} must be at least 1; use 32, 64 or 128, or 'channel'")
        if self.symmetric is False:
            raise ValueError("symmetric=false is not supported: every export format here stores a symmetric lattice")
        if self.symmetric is not True:
            raise ValueError(f"symmetric={self.symmetric!r} is not a truth value; use true")
        for name, value, allowed in (
            ("divisor", self.divisor, get_args(Divisor)),
            ("scale_grid", self.scale_grid, get_args(ScaleGrid)),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def divisor_value(self) -> float:
        """The number that absmax is divided by (exact in fp32)."""
        return {"half_range": (2**self.bits - 1) / 2, "qmax": float(self.qmax), "full_range": float(2 ** (self.bits - 1))}[self.divisor]

    @property
    def grid(self) -> GridLimits:
        """Rounding and limits of the scale."""
        return SCALE_GRIDS[self.scale_grid]

    def group_width(self, in_features: int) -> int:
        """Elements per scale for a row of ``in_features``; ValueError when the group size does not divide it."""
        if isinstance(self.group_size, str):
            return in_features
        if in_features % self.group_size:
            fits = [g for g in (128, 64, 32, 16) if in_features % g == 0]
            hint = f"use {' or '.join(map(str, fits))}" if fits else "use 'channel'"
            raise ValueError(f"group_size={self.group_size} does not divide in_features={in_features}; {hint}, or skip the module")
        return self.group_size

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the scales of a weight [out, in]: (out, groups); ValueError when the group size does not divide."""
        return out_features, in_features // self.group_width(in_features) if in_features else 0

    def to_json(self) -> dict[str, Any]:
        """Stable JSON form (all fields, sorted by name)."""
        return dict(sorted(asdict(self).items()))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "QuantSpec":
        """Inverse of ``to_json``; unknown keys are a TypeError."""
        return cls(**data)

    def hash(self) -> str:
        """sha256 of the canonical JSON form."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
