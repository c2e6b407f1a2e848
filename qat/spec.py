"""QuantSpec describes how one weight is quantized; reference, kernels, training, packing and export all read it.

Symbols: b bits, q signed code in [-2^(b-1), 2^(b-1)-1], s scale, z zero point, g group size along the input axis.

    int         w ~ (q - z) * s       z = 0 when symmetric; ternary: q in -1, 0, 1
    nf4         w ~ table[q] * s      16 quantiles of a normal distribution in [-1, 1]; s = absmax (QLoRA, arXiv 2305.14314)
    fp8_e4m3    w ~ q * s             q float8 e4m3 without infinities, |q| <= 448; s = absmax / 448
    mxfp4       w ~ q * s             q in 0, .5, 1, 1.5, 2, 3, 4, 6 with a sign; s a power of two (OCP MX v1.0), g = 32
    nvfp4       w ~ q * s / G         q as in mxfp4; s float8 e4m3, G fp32 per tensor = 448 * 6 / absmax, g = 16
    q2_k..q6_k  w ~ q * d * sc - dmin * m    super-blocks of 256 with small integers under fp16 numbers (super_blocks.py)
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from .. import Bounds, check_fields
from .super_blocks import SUPER_BLOCKS, WIDTH, SuperBlock

Kind = Literal["int", "nf4", "fp8_e4m3", "mxfp4", "nvfp4", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
Divisor = Literal["half_range", "qmax", "full_range"]
ActivationKind = Literal["int8", "fp8_e4m3", "mxfp4", "nvfp4"]
Scaling = Literal["dynamic", "static"]
ScaleGrid = Literal["bf16_fp16", "bf16", "fp16", "fp32"]
Bits = Annotated[int, Bounds(ge=2, le=8, why="4 and 8 are what serving stacks read")]
GroupSize = Annotated[int, Bounds(ge=1, why="use 32, 64 or 128, or 'channel'")] | Literal["channel", "tensor"]
Outliers = Annotated[float, Bounds(gt=0, why="0 would keep every value, so that nothing is rounded; 6 is usual")]
USUAL_GROUPS = (128, 64, 32, 16)
"""Group sizes that messages propose, the preferred first."""
TERNARY_BITS = 2
"""Width of ternary codes where they are stored as integers."""
PACKED_BITS = (2, 4, 8)
"""Widths of integer codes that divide a 32-bit word: every version of every packed format lays them out alike."""


@dataclass(frozen=True, kw_only=True)
class GridLimits:
    """The values that a scale may take: fp32 with its last mantissa bits dropped (round half to even), then clamped."""

    dropped_bits: int
    """fp32 mantissa bits that a scale may not use: 16 leaves bf16's, 13 leaves fp16's, 0 leaves all."""
    smallest: float
    """Smallest scale, itself on the grid: the smallest normal number; for bf16_fp16 the smallest that fp16 holds exactly too."""
    largest: float
    """Largest scale, itself on the grid."""


SCALE_GRIDS: dict[str, GridLimits] = {
    # From 2^-17 on, bf16 numbers are multiples of 2^-24, the spacing of fp16's subnormals; 65280 = 255 * 2^8 is bf16's last number below
    # fp16's largest, 65504. So a scale in between is exact in both.
    "bf16_fp16": GridLimits(dropped_bits=16, smallest=2.0**-17, largest=65280.0),
    # The other grids span the normal numbers of their dtype: subnormals would have fewer bits.
    "bf16": GridLimits(dropped_bits=16, smallest=2.0**-126, largest=(2.0 - 2.0**-7) * 2.0**127),
    "fp16": GridLimits(dropped_bits=13, smallest=2.0**-14, largest=65504.0),
    "fp32": GridLimits(dropped_bits=0, smallest=2.0**-126, largest=(2.0 - 2.0**-23) * 2.0**127),
}


@dataclass(frozen=True, kw_only=True)
class _Float:
    """Limits of a kind that is not int."""

    bits: int
    group_sizes: tuple[int | str, ...] | None
    """Allowed group sizes; None = all."""
    own_scales: bool
    """Whether the kind fixes the format of its scales, so that ``scale_grid`` has no effect."""


_FLOATS = {
    "nf4": _Float(bits=4, group_sizes=None, own_scales=False),
    "fp8_e4m3": _Float(bits=8, group_sizes=("tensor", "channel"), own_scales=False),
    "mxfp4": _Float(bits=4, group_sizes=(32,), own_scales=True),
    "nvfp4": _Float(bits=4, group_sizes=(16,), own_scales=True),
    **{kind: _Float(bits=form.bits, group_sizes=(WIDTH,), own_scales=True) for kind, form in SUPER_BLOCKS.items()},
}
FLOAT_BITS = {kind: form.bits for kind, form in _FLOATS.items()}
"""Bits per code of the kinds that are not int."""
IMPLIED: dict[str, dict[str, int]] = {kind: {"bits": form.bits, "group_size": WIDTH} for kind, form in SUPER_BLOCKS.items()}
"""Fields that a kind implies, so that they need not be given: those of kinds with super-blocks."""
PACKED_FLOATS = ("fp8_e4m3", "mxfp4", "nvfp4")
"""Kinds of floats that a packed format holds: compressed-tensors. nf4 has none."""
ONE_SCALING: dict[str, Scaling] = {"mxfp4": "dynamic", "nvfp4": "static"}
"""Kinds of inputs with scales per group -> the one scaling that they have."""
_NOT_STORED = {"kind": "int", "ternary": False}
"""Fields added later, with the values at which the JSON form omits them, so that older records and hashes stay valid."""


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Quantization of linear weights [out, in]: kind and width of the codes, and one scale per ``group_size`` inputs, row or tensor."""

    kind: Kind = "int"
    """Format of a code: int = integer, nf4 = 16 quantiles of a normal distribution, fp8_e4m3 = 8-bit float, mxfp4 and nvfp4 = 4-bit floats
    with scales per 32 and per 16 inputs; q2_k to q6_k = llama.cpp's K-quants, which GGUF holds: super-blocks of 256 inputs."""
    bits: Bits = 4
    """Width of a code. The kinds that are not int have a fixed width: 8 for fp8_e4m3, 2 to 6 for q2_k to q6_k, 4 for the others. q2_k to
    q6_k imply it."""
    group_size: GroupSize = 128
    """Consecutive input features that share a scale. channel = one scale per output row, tensor = one scale per matrix. q2_k to q6_k imply
    256."""
    symmetric: bool = True
    """true = zero is code 0, and there is no zero point; false (kind int) = scale (max - min) / (2^bits - 1) and an integer zero point."""
    divisor: Divisor = "half_range"
    """What the largest magnitude is divided by to give the scale, for b bits: half_range = (2^b - 1) / 2, qmax = 2^(b-1) - 1,
    full_range = 2^(b-1)."""
    scale_grid: ScaleGrid = "bf16_fp16"
    """Numbers that a scale can take. bf16_fp16 = bf16 clamped to [2^-17, 65280], which is exact in bf16 and in fp16."""
    ternary: bool = False
    """true (kind int, symmetric) = a code is -1, 0 or 1, which implies bits 2. GGUF stores groups of a multiple of 256 in 2.06 or 1.69 bits
    per weight."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in IMPLIED.get(self.kind, {}).items():
            # the default of another kind stands for a key that was not given
            if getattr(self, name) == getattr(QuantSpec, name):
                object.__setattr__(self, name, value)
        if self.ternary and self.bits == QuantSpec.bits:
            object.__setattr__(self, "bits", TERNARY_BITS)
        if self.kind == "int":
            self._check_int()
        else:
            self._check_float(_FLOATS[self.kind])

    def _check_int(self) -> None:
        # a setting without an effect is refused: a user who gives it expects one
        if not self.symmetric and self.divisor != "half_range":
            raise ValueError(
                f"divisor={self.divisor!r} has no effect with symmetric=false, which divides max - min by 2^b - 1; leave it out"
            )

        if self.ternary and (self.bits != TERNARY_BITS or not self.symmetric):
            other = f"bits={self.bits}" if self.symmetric else "symmetric=false"
            raise ValueError(f"ternary codes are -1, 0 and 1, which {other} does not fit; leave it out, or leave ternary out")

    def _check_float(self, form: _Float) -> None:
        """Every field that the kind fixes must have the fixed value or its default."""
        if self.ternary:
            raise ValueError(f"ternary=true has no effect with kind={self.kind!r}, which has its own codes; use kind='int'")
        if self.bits != form.bits:
            raise ValueError(f"kind={self.kind!r} has codes of {form.bits} bits, not {self.bits}; use bits={form.bits}")
        if form.group_sizes is not None and self.group_size not in form.group_sizes:
            choices = " or ".join(map(repr, form.group_sizes))
            raise ValueError(f"kind={self.kind!r} does not take group_size={self.group_size!r}; use group_size={choices}")
        if not self.symmetric:
            raise ValueError(f"kind={self.kind!r} has no zero point; leave symmetric out, or use kind='int'")
        if self.divisor != "half_range":
            raise ValueError(f"divisor={self.divisor!r} has no effect with kind={self.kind!r}, whose scale is fixed; leave it out")
        if form.own_scales and self.scale_grid != "bf16_fp16":
            raise ValueError(
                f"scale_grid={self.scale_grid!r} has no effect with kind={self.kind!r}, which fixes the format of scales; leave it out"
            )

    @property
    def super_block(self) -> SuperBlock | None:
        """Layout of a kind with super-blocks; None for the other kinds."""
        return SUPER_BLOCKS.get(self.kind)

    @property
    def holds_zero(self) -> bool:
        """Whether 0 is among the values of every group, so that pruned weights stay zero."""
        return self.super_block is None or not self.super_block.minimum

    @property
    def qmin(self) -> int:
        """Smallest code."""
        if self.ternary:
            return -1
        return self.super_block.codes[0] if self.super_block else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code."""
        return self.super_block.codes[1] if self.super_block else (1 << (self.bits - 1)) - 1

    @property
    def code_bits(self) -> int:
        """Width of the codes as the ops of kind int take it: 1 stands for ternary codes (``fake_quant.absmax_reference.code_limits``)."""
        return 1 if self.ternary else self.bits

    @property
    def divisor_value(self) -> float:
        """The number by which absmax (symmetric=false: max - min) is divided to get the scale; exact in fp32."""
        if self.kind != "int":
            # the largest value of the code book: 1 (NF4), 448 (e4m3), 6 (e2m1)
            return {"nf4": 1.0, "fp8_e4m3": 448.0}.get(self.kind, 6.0)
        if not self.symmetric:
            return float(2**self.bits - 1)
        # half_range is 7.5 at 4 bits: -absmax rounds to the code -8, and +absmax is clipped to 7 (compressed-tensors, GPTQ)
        return {"half_range": (2**self.bits - 1) / 2, "qmax": float(self.qmax), "full_range": float(2 ** (self.bits - 1))}[self.divisor]

    @property
    def grid(self) -> GridLimits:
        """Rounding and limits of scales."""
        return SCALE_GRIDS[self.scale_grid]

    def group_width(self, in_features: int) -> int:
        """Elements per scale in a row of ``in_features``; ValueError if the group size does not divide it."""
        if isinstance(self.group_size, str):
            return in_features
        if self.super_block and in_features % WIDTH:
            other = ", ".join(f"{name}: {value}" for name, value in self.super_block.fallback.items())
            raise ValueError(
                f"kind={self.kind!r} has blocks of {WIDTH}, which do not divide in_features={in_features}; give such modules "
                f"{{{other}}} (overrides, embedding, head), as llama.cpp too stores other blocks there, or skip them"
            )
        if in_features % self.group_size:
            fits = [g for g in USUAL_GROUPS if in_features % g == 0]
            hint = f"use {' or '.join(map(str, fits))}" if fits else "use 'channel'"
            raise ValueError(f"group_size={self.group_size} does not divide in_features={in_features}; {hint}, or skip the module")
        return self.group_size

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the scales of a weight [out, in]: (out, groups), or (1, 1) for one scale per tensor; ValueError as ``group_width``."""
        # one scale for the matrix needs no width that a group divides
        if self.group_size == "tensor":
            return 1, 1
        # an empty matrix has no groups
        return out_features, in_features // self.group_width(in_features) if in_features else 0

    def words(self) -> str:
        """The spec in words: '4 bits in groups of 64, with zero points'."""
        # the other kinds have one width, which their name says
        codes = self.kind if self.kind != "int" else "ternary codes" if self.ternary else f"{self.bits} bits"
        if self.super_block:
            return codes
        shared = {"channel": "with one scale per row", "tensor": "with one scale"}.get(
            str(self.group_size), f"in groups of {self.group_size}"
        )
        return f"{codes} {shared}" + ("" if self.symmetric else ", with zero points")

    def as_stored(self) -> "QuantSpec":
        """What readers of packed integer codes see of the spec: kind, bits, groups and zero points, not how scales were found.

        Formats repeat one scale per matrix for each row.
        """
        return QuantSpec(
            kind=self.kind,
            bits=self.bits,
            group_size="channel" if self.group_size == "tensor" else self.group_size,
            symmetric=self.symmetric,
        )

    def with_bits(self, bits: int) -> "QuantSpec":
        """The same spec with codes of another width."""
        return replace(self, bits=bits, ternary=self.ternary and bits == self.bits)

    def to_json(self) -> dict[str, Any]:
        """Stable JSON form: fields sorted by name; fields added later are present only if they differ from their default."""
        # an Ellipsis equals no value: fields without an entry are always stored
        return {name: value for name, value in sorted(asdict(self).items()) if _NOT_STORED.get(name, ...) != value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "QuantSpec":
        """Inverse of ``to_json``; unknown keys are a TypeError."""
        return cls(**data)

    def hash(self) -> str:
        """sha256 of the canonical JSON form."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ActivationSpec:
    """Quantization of activations [..., features], or of keys and values [..., head_dim] on their way into the cache.

    int8 divides absmax by 127, as serving kernels do; fp8_e4m3 by 448. Scales are fp32. mxfp4 and nvfp4 have scales per 32 and per 16
    features, computed in the forward pass; those of nvfp4 are e4m3 numbers under a fixed fp32 scale for all tokens.
    """

    kind: ActivationKind = "int8"
    """Format of a code: int8 = integer, fp8_e4m3 = 8-bit float, mxfp4 and nvfp4 = 4-bit floats (inputs of linears only)."""
    scaling: Scaling = "dynamic"
    """dynamic = one scale per token (row of the last axis), computed in the forward pass; static = one fixed scale for all tokens. mxfp4 is
    dynamic, nvfp4 static: it stores the scale above those of its groups."""
    symmetric: bool = True
    """true = zero is code 0, and there is no zero point; false (kind int8) = scale and zero point, with the range of the values split into
    255 steps."""
    outliers: Outliers | None = None
    """int8, dynamic, symmetric: values whose magnitude is at least this stay unrounded, and the scale is that of the others (LLM.int8();
    its authors use 6). Default: none."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.outliers is not None and (self.kind, self.scaling, self.symmetric) != ("int8", "dynamic", True):
            raise ValueError(
                f"outliers={self.outliers:g} stay beside symmetric int8 codes with one scale per token; leave outliers out, or use "
                "kind='int8', scaling='dynamic' and symmetric=true"
            )
        if not self.symmetric and self.kind != "int8":
            raise ValueError(f"kind={self.kind!r} has no zero point; leave symmetric out, or use kind='int8'")
        if (only := ONE_SCALING.get(self.kind, self.scaling)) != self.scaling:
            raise ValueError(f"kind={self.kind!r} has scaling={only!r}, not {self.scaling!r}; write scaling: {only}")
        # made here and kept: torch.compile, which traces forward passes, cannot trace the checks of a new spec
        _ = self.matrix_spec, self.of_the_others

    @property
    def observes(self) -> bool:
        """Whether rounding after training looks at the values on calibration text: for static scales, or to count outliers."""
        return self.scaling == "static" or self.outliers is not None

    @cached_property
    def of_the_others(self) -> "ActivationSpec | None":
        """The quantization of the values that are no outliers; None if there are none."""
        return None if self.outliers is None else replace(self, outliers=None)

    @cached_property
    def matrix_spec(self) -> QuantSpec:
        """The same quantization as a QuantSpec of the matrix [tokens, features]."""
        group = "channel" if self.scaling == "dynamic" else "tensor"
        if self.kind == "fp8_e4m3":
            return QuantSpec(kind="fp8_e4m3", bits=8, group_size=group, scale_grid="fp32")
        if self.kind != "int8":
            return QuantSpec(kind=self.kind, group_size=_FLOATS[self.kind].group_sizes[0])  # pyright: ignore[reportOptionalSubscript, reportArgumentType] - both have one
        # symmetric: 127, as serving kernels divide; asymmetric specs allow no other divisor than half_range
        divisor = "qmax" if self.symmetric else "half_range"
        return QuantSpec(bits=8, group_size=group, symmetric=self.symmetric, divisor=divisor, scale_grid="fp32")

    def to_json(self) -> dict[str, Any]:
        """Stable JSON form: fields sorted by name; ``outliers``, which came later, only where it is given."""
        return {name: value for name, value in sorted(asdict(self).items()) if name != "outliers" or value is not None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ActivationSpec":
        """Inverse of ``to_json``; unknown keys are a TypeError."""
        return cls(**data)
