"""What a user may choose about the stages that end in codes: training through the rounding, and rounding without training."""

from dataclasses import dataclass, field
from typing import Literal

from ..qat.scheme import QuantScheme, SpecChange
from ..qat.spec import ActivationSpec, QuantSpec
from .settings import TrainingBlock


@dataclass(frozen=True, kw_only=True)
class SchemeSettings:
    """Which module is rounded to what."""

    weights: QuantSpec = field(default_factory=QuantSpec)
    """The weight lattice of the decoder layers' linears."""
    skip: tuple[str, ...] = ()
    """Module name patterns (fnmatch) left in full precision; one that matches nothing is an error."""
    overrides: dict[str, SpecChange] = field(default_factory=dict)
    """Module name pattern -> what those linears have otherwise than weights, such as '*.down_proj': {bits: 8}; one that matches nothing is
    an error, and so are two that differ and match the same module."""
    embedding: SpecChange | None = None
    """What the input embedding has otherwise than weights, such as {bits: 8}; of a tied model the head's too. Default: left alone."""
    head: SpecChange | None = None
    """What an untied output head has otherwise than weights; default: left alone."""
    activations: ActivationSpec | None = None
    """How the inputs of the linears are rounded, such as {kind: int8}; default: not at all."""
    kv_cache: ActivationSpec | None = None
    """How keys and values are rounded as they enter the cache, such as {kind: fp8_e4m3, scaling: static}; default: not at all."""
    allow_partial: bool = False
    """Go on where less than 95 % of the decoder's weights are in linears that can be quantized, as with experts in
    three-dimensional parameters; the others stay as they are."""

    @property
    def scheme(self) -> QuantScheme:
        """The same as the library takes it; ValueError when a change does not go together with weights."""
        return QuantScheme(weights=self.weights, skip=self.skip, overrides=self.overrides, embedding=self.embedding, head=self.head)

    @property
    def ends(self) -> list[str]:
        """Which of embedding and head are rounded."""
        return [key for key in ("embedding", "head") if getattr(self, key) is not None]

    def _check_inputs(self) -> None:
        """Embedding and head have no inputs of the kind that activations round."""
        for key in self.ends if self.activations is not None else ():
            raise ValueError(f"{key} cannot be rounded together with activations, which are inputs of the decoder layers; leave one out")


@dataclass(frozen=True, kw_only=True)
class QatSettings(SchemeSettings, TrainingBlock):
    """Train with weights rounded in the forward pass; ends in codes and scales ready to pack."""

    scales: Literal["learned", "absmax"] = "learned"
    """learned = trained beside the weights (LSQ); absmax = taken anew from the weights in every forward, as kinds other than int always
    have them."""
    scale_learning_rate: float | None = None
    """Peak rate of learned scales; default: a thirtieth of the others'."""
    start: Literal["rtn", "mse", "gptq"] | None = None
    """First scales: from the largest magnitude, searched for the smallest squared error, or by GPTQ on training text, whose codes are
    then the first weights too. Default: gptq; mse with delay, anneal_from or lora; rtn with absmax scales."""
    train: Literal["all", "scales"] = "all"
    """scales = only these, over codes that stay as 'start' makes them: a byte a weight and no optimizer state for it."""
    lora: int | None = None
    """Rank of an adapter that trains in place of the quantized weights; what is rounded, and stored, is the merged weight."""
    delay: float = 0.0
    """Share of the steps, at the beginning, that train unrounded weights; scales are taken from the weights at its end."""
    anneal_from: int | None = None
    """Bits that rounding begins with; a bit less at a time until 'weights' is reached."""
    anneal: float = 0.5
    """Share of the steps, after the delay, over which bits are taken away."""
    freeze_scales: float = 0.0
    """Share of the steps, at the end, with scales that no longer change."""
    calibration_tokens: int | None = None
    """start: gptq: tokens of training text that it looks at; default as in quantize."""
    final_learning_rate: float = 0.0
    """Share of the peak rate kept at the last step, [0, 1]: codes at the edge of their cells come to rest."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW moments; a longer memory than elsewhere, for a model that is near its teacher has gradients that are mostly noise."""

    def __post_init__(self) -> None:
        TrainingBlock.__post_init__(self)
        _ = self.scheme
        self._check_kind()
        self._check_ends()
        if self.train == "scales" and self.scales != "learned":
            raise ValueError("train=scales trains the scales and nothing else: it needs scales=learned")
        searched = self.start not in (None, "rtn")
        if self.scales == "absmax" and (searched or self.scale_learning_rate is not None):
            key = "start" if searched else "scale_learning_rate"
            raise ValueError(f"{key} does nothing with scales=absmax, which are taken anew in every forward; use scales=learned")
        if self.first != "gptq" and self.calibration_tokens is not None:
            raise ValueError(f"calibration_tokens={self.calibration_tokens} does nothing unless start is gptq; leave it out")
        self._check_schedule()
        self._check_trained()

    @property
    def first(self) -> Literal["rtn", "mse", "gptq"]:
        """``start``, or what stands for it."""
        if self.start is not None or self.scales == "absmax" or self.weights.kind != "int":
            return self.start or "rtn"
        # what GPTQ finds belongs to the final bits and to weights that train
        return "mse" if self.delay or self.anneal_from is not None or self.lora is not None else "gptq"

    @property
    def start_rounding(self) -> "QuantizeSettings | None":
        """What rounds the model before training, for ``start: gptq``; None for other starts."""
        if self.first != "gptq":
            return None
        same = {
            name: getattr(self, name)
            for name in ("weights", "skip", "overrides", "embedding", "head", "activations", "kv_cache", "allow_partial")
        }
        return QuantizeSettings(**same, method="gptq", calibration_tokens=self.calibration_tokens, stream="never")

    def _check_kind(self) -> None:
        """What needs integer codes is refused for other kinds."""
        if self.weights.kind == "int":
            return
        dials = {
            "start": self.start not in (None, "rtn"),
            "scale_learning_rate": self.scale_learning_rate is not None,
            "train": self.train != "all",
            "anneal_from": self.anneal_from is not None,
            "freeze_scales": self.freeze_scales > 0,
        }
        for key in (key for key, given in dials.items() if given):
            raise ValueError(
                f"{key} needs integer codes, and weights have kind={self.weights.kind}, whose scales are never learned; leave it out"
            )

    def _check_ends(self) -> None:
        """Embedding and head are refused where they would not be what was asked for."""
        for key in self.ends if self.train == "scales" else ():
            raise ValueError(f"{key} does nothing with train=scales, which trains linears of the decoder layers alone; leave it out")
        self._check_inputs()

    def _check_schedule(self) -> None:
        for name in ("delay", "anneal", "freeze_scales"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1): it is a share of the steps")
        if self.anneal_from is None and self.anneal != 0.5:
            raise ValueError(f"anneal={self.anneal:g} does nothing without anneal_from, the bits to begin with")
        if self.anneal_from is not None and not self.weights.bits < self.anneal_from <= 8:
            raise ValueError(f"anneal_from={self.anneal_from} must lie above bits={self.weights.bits} and be at most 8")
        last = self.delay + (self.anneal if self.anneal_from is not None else 0.0)
        if last + self.freeze_scales > 1:
            raise ValueError(f"delay, anneal and freeze_scales take {last + self.freeze_scales:.0%} of the steps; together at most 100%")
        if self.start == "gptq" and (self.delay or self.anneal_from is not None):
            key = "delay" if self.delay else "anneal_from"
            raise ValueError(f"{key} does nothing good with start=gptq, which fits the weights as they are to the final bits; leave it out")

    def _check_trained(self) -> None:
        if self.lora is not None and self.lora < 1:
            raise ValueError(f"lora={self.lora} must be at least 1: it is the adapter's rank; 16 or 32 are usual")
        if self.train == "scales":
            for name, unused in (("lora", None), ("delay", 0.0), ("anneal_from", None), ("freeze_scales", 0.0)):
                if getattr(self, name) != unused:
                    raise ValueError(f"{name} does nothing with train=scales, whose codes stay as they are; leave it out")
        if self.lora is not None and self.start == "gptq":
            raise ValueError("start=gptq changes the weights that an adapter leaves alone; use start=mse with lora")


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings(SchemeSettings):
    """Round without training.

    What is not given is filled in, except dials that the chosen method does not have: those stay None, and giving one is an error.
    """

    method: Literal["rtn", "mse", "gptq"] = "rtn"
    """rtn = round to nearest; mse = scales searched for the least squared error; gptq = column by column, later ones making good what
    earlier ones cost, on calibration text (arXiv 2210.17323)."""
    scale: Literal["absmax", "mse", "fitted"] | None = None
    """gptq: where its scales come from, default fitted. mse = searched, each input weighted by its mean square; fitted = then also fitted
    to the layer's outputs by least squares, in turn with the rounding."""
    damping: float | None = None
    """gptq: share of the Hessian's mean diagonal added to its diagonal, in [0, 1], default 0.01; raised where that is not enough."""
    activation_order: bool | None = None
    """gptq: columns with the largest inputs first, default true; groups stay those of the original columns."""
    weighted: bool | None = None
    """mse: the error of a weight counts by the mean square of its input, which takes calibration text; default false."""
    calibration_tokens: int | None = None
    """gptq, mse with weighted, and static scaling: tokens of training text to calibrate on, in windows chosen at random, default 262,144:
    the 128 windows of 2,048 of the GPTQ paper (section 4), several times the inputs of the widest layers; fewer when the text has fewer."""
    stream: Literal["auto", "always", "never"] = "auto"
    """Read, round and write one decoder layer after the other, for models larger than memory: the same result, more disk; auto = when
    memory is too small for the whole model in fp32."""

    def __post_init__(self) -> None:
        _ = self.scheme
        if self.weights.kind != "int" and self.method != "rtn":
            raise ValueError(f"method={self.method} chooses integer codes; kind={self.weights.kind} is rounded to nearest: use method=rtn")
        self._fill("scale", "fitted", "gptq")
        self._fill("damping", 0.01, "gptq")
        self._fill("activation_order", True, "gptq")
        self._fill("weighted", False, "mse")
        self._check_inputs()
        if any(spec is not None and spec.scaling == "static" for spec in (self.activations, self.kv_cache)):
            self._fill("calibration_tokens", 262_144, self.method)
        elif self.method == "mse" and not self.weighted and self.calibration_tokens is not None:
            raise ValueError(
                f"calibration_tokens={self.calibration_tokens} does nothing with method=mse unless weighted is true; leave it out"
            )
        elif self.weighted is not False:
            self._fill("calibration_tokens", 262_144, "gptq", "mse")
        if self.damping is not None and not 0 <= self.damping <= 1:
            raise ValueError(f"damping={self.damping:g} must lie in [0, 1]: it is a share of the Hessian's mean diagonal; 0.01 is usual")

    @property
    def calibrates(self) -> bool:
        """Whether there is text to look at, for the method or for static scales."""
        return self.calibration_tokens is not None

    def _fill(self, dial: str, default: object, *methods: str) -> None:
        """Fill a dial in where the method has it; refuse one that it has not."""
        value = getattr(self, dial)
        if self.method not in methods:
            if value is not None:
                has = " and ".join(methods)
                raise ValueError(f"{dial}={_word(value)} does nothing with method={self.method}: it belongs to {has}; leave it out")
        elif value is None:
            object.__setattr__(self, dial, default)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
