"""The settings of weights whose widths are chosen by sensitivity, within a budget: ``weights: {bits: auto, budget: 3.5}``.

The module imports no torch: recipes and plans read it.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from .. import Bounds, Count
from ..models.common.byte_amounts import read_bytes
from .scheme import SpecChange
from .spec import Bits, QuantSpec

LEFT_ALONE = 16
"""The width of a module that is not quantized."""
WIDTHS = (2, 3, 4, 8, LEFT_ALONE)
"""Candidates if the settings name none."""
TOKENS = 16_384
"""Tokens on which sensitivity is measured if the settings give no number."""
Estimate = Literal["cheap", "second_order", "exact"]
Candidate = SpecChange | None
"""How a module's weights may be stored, as a change of the common spec; None = it is left alone, in 16 bits."""
_AUTO_ONLY = ("budget", "widths", "sensitivity", "sensitivity_tokens")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that a model may take. One of the two is given."""

    bits: float | None = None
    """Bits per weight, scales and zero points counted: the mean over the linears that the stage is asked to quantize."""
    bytes: int | None = None
    """Bytes of the whole model as served: packed linears, and everything else in 16 bits."""

    def words(self) -> str:
        """The budget in words: '3.5 bits per weight' or '60,000,000 bytes'."""
        return f"{self.bits:g} bits per weight" if self.bytes is None else f"{self.bytes:,} bytes"


@dataclass(frozen=True, kw_only=True)
class WeightSettings(QuantSpec):
    """Quantization of linear weights [out, in]: kind and width of the codes, and one scale per `group_size` inputs, row or tensor. With
    `bits: auto` each module gets a width of its own, by what it costs the model's output, within a budget."""

    bits: Bits | Literal["auto"] = 4  # pyright: ignore[reportIncompatibleVariableOverride] - a stage replaces it before it works
    """Width of a code. The kinds that are not int have a fixed width: 8 for fp8_e4m3, 4 for the others. auto = a width for each module,
    chosen by sensitivity within budget; q, k and v have one together, gate and up too, and all experts of a layer."""
    budget: float | str | None = None
    """bits auto: the most that the model may take. A number = bits per weight, scales counted, as the mean over the linears that the stage
    quantizes. An amount with a unit, such as 60MB = the whole model as served."""
    widths: tuple[Annotated[int, Bounds(ge=2, le=16, why="16 leaves a module alone")], ...] | None = None
    """bits auto: the widths to choose from; 16 = left alone. Default: those of 2, 3, 4, 8 and 16 that every export of the recipe can
    hold."""
    sensitivity: Estimate | None = None
    """bits auto: how the loss of a module at a width is found, as KL per token of the model's output. cheap = from gradients, tokens
    counted as independent; second_order = from gradients over whole windows, with more noise; exact = by running the model from the module
    on. Default: cheap."""
    sensitivity_tokens: Count | None = None
    """bits auto: tokens of training text on which it is found. Default: 16,384, fewer when the text has fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != "auto":
            for name in _AUTO_ONLY:
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)} has no effect with bits={self.bits}; use bits=auto, or leave it out")
            return
        if self.kind != "int":
            raise ValueError(f"kind={self.kind!r} has one width, so there is none to choose with bits='auto'; use kind='int'")
        if self.budget is None:
            raise ValueError("bits='auto' needs a budget: bits per weight, such as budget=3.5, or bytes, such as budget=60MB")
        _ = self.limit
        self._check_widths()
        # defaults are written into the settings, so that records, stage keys and plans show what is used
        object.__setattr__(self, "sensitivity", self.sensitivity or "cheap")
        object.__setattr__(self, "sensitivity_tokens", self.sensitivity_tokens or TOKENS)

    def settled(self) -> QuantSpec:
        """A plain QuantSpec, unless widths are to be chosen."""
        return self if self.bits == "auto" else self.with_bits(self.bits)

    def with_bits(self, bits: int) -> QuantSpec:
        """The spec of every module with ``bits``."""
        own: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(QuantSpec)}
        return QuantSpec(**{**own, "bits": bits})

    @property
    def base(self) -> QuantSpec:
        """The spec of the widest candidate that is quantized; candidates and overrides are changes of it."""
        return self.with_bits(max(width for width in self.given_widths if width != LEFT_ALONE))

    @property
    def given_widths(self) -> tuple[int, ...]:
        """``widths``, or their default, the smallest first."""
        return tuple(sorted(WIDTHS if self.widths is None else self.widths))

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """What a module may become, the smallest first."""
        return tuple(None if width == LEFT_ALONE else SpecChange(bits=width) for width in self.given_widths)

    @property
    def limit(self) -> Budget:
        """The budget as a number.

        Raises:
            ValueError: it is neither a number of bits nor an amount of bytes.
        """
        if isinstance(self.budget, str):
            found = read_bytes(self.budget)
            if found is None or not found[1]:
                raise ValueError(f"budget={self.budget!r} is neither bits per weight, such as 3.5, nor bytes with a unit, such as 60MB")
            return Budget(bytes=found[0])
        if isinstance(self.budget, bool) or not isinstance(self.budget, int | float):
            raise ValueError(f"budget={self.budget!r} is neither bits per weight, such as 3.5, nor bytes with a unit, such as 60MB")
        if not 0 < self.budget < LEFT_ALONE:
            raise ValueError(
                f"budget={self.budget:g} must be greater than 0 and less than 16, the bits of an unquantized weight; write bytes with "
                "their unit, such as budget=60MB"
            )
        return Budget(bits=float(self.budget))

    def _check_widths(self) -> None:
        widths = self.given_widths
        wrong = [width for width in widths if width > 8 and width != LEFT_ALONE]
        if wrong:
            raise ValueError(f"widths={wrong[0]} cannot be chosen: codes have 2 to 8 bits, and 16 leaves a module alone")
        if len(set(widths)) != len(widths):
            raise ValueError(f"widths={list(self.widths or ())} names a width twice")
        if len(widths) < 2 or all(width == LEFT_ALONE for width in widths):
            raise ValueError(f"widths={list(widths)} leaves nothing to choose; give two or more, or that number as bits")
        # a module at the smallest width takes more than its codes, so a budget of that many bits is below every assignment
        if self.limit.bits is not None and self.limit.bits < widths[0]:
            raise ValueError(
                f"budget={self.limit.bits:g} is below {widths[0]} bits, the smallest of widths, whose scales are counted too; raise it"
            )
