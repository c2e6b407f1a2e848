"""QuantSpec: the one description of a weight lattice that drives reference, kernel, training, packing and export.

Symbols: b bits, q signed code in [-2^(b-1), 2^(b-1)-1], s scale, g group size along the input axis. w ~ q * s.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

Divisor = Literal["half_range", "qmax", "full_range"]
ScaleGrid = Literal["bf16_fp16", "bf16", "fp16", "fp32"]


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
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} is outside 2..8; 4 and 8 are what serving stacks read")
        if isinstance(self.group_size, str):
            if self.group_size != "channel":
                raise ValueError(f"group_size={self.group_size!r} is neither a number nor 'channel'")
        elif self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1; use 32, 64 or 128, or 'channel'")
        if not self.symmetric:
            raise ValueError("symmetric=false is not supported: every export format here stores a symmetric lattice")

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
        """The number that absmax is divided by."""
        return {"half_range": (2**self.bits - 1) / 2, "qmax": float(self.qmax), "full_range": float(2 ** (self.bits - 1))}[self.divisor]

    def group_width(self, in_features: int) -> int:
        """Elements per scale for a row of ``in_features``; ValueError when the group size does not divide it."""
        if isinstance(self.group_size, str):
            return in_features
        if in_features % self.group_size:
            fits = [g for g in (128, 64, 32, 16) if in_features % g == 0]
            hint = f"use {' or '.join(map(str, fits))}" if fits else "use 'channel'"
            raise ValueError(f"group_size={self.group_size} does not divide in_features={in_features}; {hint}, or skip the module")
        return self.group_size

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
