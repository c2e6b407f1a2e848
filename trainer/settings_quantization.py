"""Settings of the stages that quantize: training with rounded weights (qat), and rounding without training (quantize)."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .. import Bounds, Count, WrittenAs, check_fields
from ..qat.auto_weights import WeightSettings
from ..qat.mixes import MIXES, MixName
from ..qat.scheme import QuantScheme, SpecChange
from ..qat.spec import ONE_SCALING, ActivationSpec, QuantSpec
from ..qat.transforms.settings import TransformSettings
from .settings import Moment, Rate, Share, ShareOfSteps, TrainingBlock


@dataclass(frozen=True, kw_only=True)
class SchemeSettings:
    """Which modules are quantized, and how."""

    weights: Annotated[QuantSpec, WrittenAs(WeightSettings)] = field(default_factory=QuantSpec)
    """Quantization of the weights of the decoder layers' linears; with bits auto, a width for each within a budget."""
    mix: MixName | None = None
    """A mixture of llama.cpp in place of weights, such as q4_k_m: v_proj, down_proj and o_proj get more bits in some layers, embedding and
    head too, and matrices whose inputs are no multiple of 256 get blocks of 32. overrides, embedding, head and skip change single
    matrices. Default: none."""
    skip: tuple[str, ...] = ()
    """Module name patterns (fnmatch) that stay in full precision. A pattern that matches nothing is an error."""
    overrides: dict[str, SpecChange] = field(default_factory=dict)
    """Module name pattern -> how those linears differ from weights, such as '*.down_proj': {bits: 8}. A pattern that matches nothing is an
    error, and so are two patterns that differ and match the same module."""
    embedding: SpecChange | None = None
    """How the input embedding differs from weights, such as {bits: 8}; in a tied model also the output head. Default: not quantized."""
    head: SpecChange | None = None
    """How an untied output head differs from weights. Default: not quantized."""
    activations: ActivationSpec | None = None
    """Quantization of the inputs of the linears, such as {kind: int8}. Default: not quantized."""
    kv_cache: ActivationSpec | None = None
    """Quantization of keys and values as they enter the cache, such as {kind: fp8_e4m3, scaling: static}. Default: not quantized."""
    allow_partial: bool = False
    """Continue when less than 95% of the decoder's weights are in linears that can be quantized, as with experts in three-dimensional
    parameters. The other weights are not quantized."""

    @property
    def scheme(self) -> QuantScheme:
        """The scheme in the form that ``decoct.qat`` takes.

        Raises:
            ValueError: an override does not fit ``weights``.
        """
        assert self.auto is None, "widths are chosen before a scheme is asked for (trainer/stages/bit_choice.py)"
        return self.scheme_with(self.weights)

    def scheme_with(self, weights: QuantSpec) -> QuantScheme:
        """The scheme with another spec in place of ``weights``."""
        return QuantScheme(
            weights=weights, skip=self.skip, overrides=self.overrides, embedding=self.embedding, head=self.head, mix=self.mix
        )

    @property
    def auto(self) -> WeightSettings | None:
        """``weights``, if widths are to be chosen within a budget."""
        return self.weights if isinstance(self.weights, WeightSettings) else None

    def _check_scheme(self) -> None:
        """Refuse changes that do not fit ``weights``, and ends without a width where widths are chosen."""
        if self.auto is None:
            _ = self.scheme
            return
        _ = self.scheme_with(self.auto.base)
        for key in self.ends:
            change: SpecChange = getattr(self, key)
            if change.bits is None and change.kind is None:
                raise ValueError(f"{key}: weights.bits=auto chooses among linears of the decoder layers; give {key}.bits, such as 8")

    @property
    def ends(self) -> list[str]:
        """The names of embedding and head, as far as they are quantized."""
        return [key for key in ("embedding", "head") if getattr(self, key) is not None]

    def _take_mix(self) -> None:
        """Set ``weights`` to the kind of most matrices of the mixture; refuse other ones."""
        if self.mix is None:
            return
        most = QuantSpec(kind=MIXES[self.mix].most)
        if self.weights not in (QuantSpec(), most):
            raise ValueError(
                f"weights have no effect with mix={self.mix!r}, which chooses the kind of each matrix; leave weights out, or leave mix out "
                "and name single matrices in overrides"
            )
        # so that records, stage keys and plans show what is used; the dataclass is frozen
        object.__setattr__(self, "weights", most)

    def _check_inputs(self) -> None:
        """Refuse embedding or head together with activations, which exist only in decoder layers, and what keys and values cannot have."""
        if self.mix is not None and self.activations is not None:
            raise ValueError("mix rounds embedding and head, and activations are inputs of the decoder layers; leave one out")
        if self.kv_cache is not None and self.kv_cache.outliers is not None:
            raise ValueError("kv_cache.outliers has no effect: outliers stay unrounded in activations alone; leave it out")
        if self.kv_cache is not None and self.kv_cache.kind in ONE_SCALING:
            raise ValueError(f"kv_cache has no kind={self.kv_cache.kind}, whose groups are those of inputs; use kind: fp8_e4m3")
        for key in self.ends if self.activations is not None else ():
            raise ValueError(f"{key} cannot be rounded together with activations, which are inputs of the decoder layers; leave one out")


@dataclass(frozen=True, kw_only=True)
class QatSettings(SchemeSettings, TrainingBlock):
    """Train with weights rounded in the forward pass. The result is codes and scales that are ready to pack."""

    scales: Literal["learned", "absmax"] = "learned"
    """learned = trained together with the weights (LSQ); absmax = computed from the weights in every forward pass, as kinds other than int
    always do."""
    scale_learning_rate: Rate | None = None
    """Peak learning rate of learned scales. Default: a thirtieth of learning_rate."""
    start: Literal["rtn", "mse", "gptq"] | None = None
    """First scales: rtn = from the largest magnitude; mse = searched for the smallest squared error; gptq = by GPTQ on training text, whose
    codes are then also the first weights; an input that has codes of the same scheme already, as after quantize, keeps them. Default: gptq;
    mse with delay, anneal_from or lora; rtn with absmax scales."""
    train: Literal["all", "scales"] = "all"
    """all = weights and scales; scales = only the scales, over codes that stay as start makes them: one byte per weight, and no optimizer
    state for it."""
    lora: Annotated[int, Bounds(ge=1, why="it is the adapter's rank; 16 or 32 are usual")] | None = None
    """Rank of an adapter that trains in place of the quantized weights. The merged weight is what is rounded and stored."""
    delay: ShareOfSteps = 0.0
    """Share of the steps, at the beginning, that train unrounded weights. Scales are taken from the weights when it ends."""
    anneal_from: Annotated[int, Bounds(ge=3, le=8)] | None = None
    """Bits that rounding begins with; must be more than weights.bits. They fall one at a time until weights.bits is reached."""
    anneal: ShareOfSteps = 0.5
    """anneal_from: share of the steps, after the delay, over which the bits fall."""
    freeze_scales: ShareOfSteps = 0.0
    """Share of the steps, at the end, with scales that no longer change."""
    calibration_tokens: Count | None = None
    """start gptq: tokens of training text that GPTQ calibrates on. Default: 262,144, as in quantize."""
    final_learning_rate: Share = 0.0
    """Learning rate of the last step, as a share of the peak rate. At 0, codes at the edge of their cells come to rest."""
    betas: tuple[Moment, Moment] = (0.9, 0.99)
    """AdamW betas of the first and second moment. The second is larger than in other stages: a model that is near its teacher has gradients
    that are mostly noise."""

    def __post_init__(self) -> None:
        TrainingBlock.__post_init__(self)
        self._take_mix()
        self._check_scheme()
        self._check_kind()
        self._check_ends()
        if self.train == "scales" and self.scales != "learned":
            raise ValueError("train=scales trains the scales and nothing else: it needs scales=learned")
        # rtn is allowed: absmax scales are what rtn computes
        searched = self.start not in (None, "rtn")
        if self.scales == "absmax" and (searched or self.scale_learning_rate is not None):
            key = "start" if searched else "scale_learning_rate"
            raise ValueError(f"{key} has no effect with scales=absmax, which are computed in every forward pass; use scales=learned")
        if self.first != "gptq" and self.calibration_tokens is not None:
            raise ValueError(f"calibration_tokens={self.calibration_tokens} has no effect unless start is gptq; leave it out")
        self._check_schedule()
        self._check_trained()

    @property
    def first(self) -> Literal["rtn", "mse", "gptq"]:
        """``start``, or its default for these settings."""
        if self.start is not None or self.scales == "absmax" or self.weights.kind != "int":
            return self.start or "rtn"
        # GPTQ rounds to the final bits and changes the weights, which delay, annealing and adapters do not allow
        return "mse" if self.delay or self.anneal_from is not None or self.lora is not None else "gptq"

    @property
    def start_rounding(self) -> "QuantizeSettings | None":
        """Settings of the rounding before training, for ``start: gptq``; None for other starts."""
        if self.first != "gptq":
            return None
        # the same scheme as training, so that the codes of the start fit its modules
        same = {
            name: getattr(self, name)
            for name in ("weights", "mix", "skip", "overrides", "embedding", "head", "activations", "kv_cache", "allow_partial")
        }
        return QuantizeSettings(**same, method="gptq", calibration_tokens=self.calibration_tokens, stream="never")

    def _check_kind(self) -> None:
        """Refuse settings that need integer codes when ``weights`` have another kind."""
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
        """Refuse embedding and head where they could not be quantized as asked."""
        for key in self.ends if self.train == "scales" else ():
            raise ValueError(f"{key} has no effect with train=scales, which trains only linears of the decoder layers; leave it out")
        self._check_inputs()

    def _check_schedule(self) -> None:
        if self.anneal_from is None and self.anneal != 0.5:
            raise ValueError(f"anneal={self.anneal:g} has no effect without anneal_from, the number of bits to begin with")
        if self.anneal_from is not None and self.auto is not None:
            raise ValueError(f"anneal_from={self.anneal_from} falls to a number of bits, and weights.bits=auto has several; leave one out")
        if self.anneal_from is not None and self.anneal_from <= self.weights.bits:
            raise ValueError(f"anneal_from={self.anneal_from} must be greater than bits={self.weights.bits}")
        # anneal counts only when it is used: its default is half of the steps
        last = self.delay + (self.anneal if self.anneal_from is not None else 0.0)
        # these phases follow each other, so together they have the whole stage at most
        if last + self.freeze_scales > 1:
            raise ValueError(f"delay, anneal and freeze_scales take {last + self.freeze_scales:.0%} of the steps; together at most 100%")
        if self.start == "gptq" and (self.delay or self.anneal_from is not None):
            key = "delay" if self.delay else "anneal_from"
            raise ValueError(f"{key} does not go together with start=gptq, which rounds to the final bits at once; leave one of them out")

    def _check_trained(self) -> None:
        if self.train == "scales":
            for name, unused in (("lora", None), ("delay", 0.0), ("anneal_from", None), ("freeze_scales", 0.0)):
                if getattr(self, name) != unused:
                    raise ValueError(f"{name} has no effect with train=scales, whose codes never change; leave it out")
        if self.lora is not None and self.start == "gptq":
            raise ValueError("start=gptq changes the weights that an adapter leaves alone; use start=mse with lora")


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings(SchemeSettings):
    """Round without training.

    An option that is not given gets its default. An option that the method does not have stays None; giving one is an error.
    """

    method: Literal["rtn", "mse", "gptq"] = "rtn"
    """rtn = round to nearest; mse = search scales for the smallest squared error (nvfp4: four over six); gptq = round column by column on
    calibration text, where later columns compensate for the error of earlier ones (arXiv 2210.17323)."""
    scale: Literal["absmax", "mse", "fitted"] | None = None
    """gptq: source of the scales. absmax = largest magnitude; mse = searched, with each input weighted by its mean square; fitted =
    searched, then fitted to the layer's outputs by least squares, in turn with the rounding. Default: fitted; mse for kinds other than
    int, which cannot be fitted."""
    damping: Annotated[float, Bounds(ge=0, le=1, why="it is a share of the Hessian's mean diagonal; 0.01 is usual")] | None = None
    """gptq: share of the Hessian's mean diagonal that is added to its diagonal; raised where that is not enough. Default: 0.01."""
    activation_order: bool | None = None
    """gptq: round the columns with the largest inputs first; groups remain those of the original columns. Default: true."""
    weighted: bool | None = None
    """mse: weight the error of a weight by the mean square of its input, which needs calibration text. Default: false."""
    importance: str | None = None
    """mse: path of an importance matrix of llama.cpp (.dat or .gguf), whose mean squares weight the errors in place of weighted, without
    calibration text. Embedding and head have none."""
    transform: TransformSettings | None = None
    """What is done to the weights before they are rounded, such as awq or {method: rotation, residual: false}: the unrounded model stays
    the same, and rounding loses less. Default: nothing."""
    calibration_tokens: Count | None = None
    """gptq, mse with weighted, static scaling, outliers, and transform awq or smoothquant: tokens of training text to calibrate on, in
    windows chosen at random. Default: 262,144, which is the 128 windows of 2,048 tokens of the GPTQ paper (section 4) and several times the
    inputs of the widest layers; fewer when the text has fewer."""
    stream: Literal["auto", "always", "never"] = "auto"
    """Read, round and write one decoder layer after the other, for models that are larger than memory: the same result with more disk.
    auto = when memory is too small for the whole model in fp32."""

    def __post_init__(self) -> None:
        check_fields(self)
        self._take_mix()
        self._check_scheme()
        if self.auto is not None and self.stream == "always":
            raise ValueError("stream=always reads one layer at a time, and weights.bits=auto looks at the whole model; use stream=never")
        # the fp16 numbers of super-blocks are fitted as scales of integers are
        fits = self.weights.kind == "int" or bool(self.weights.super_block)
        if not fits and self.scale == "fitted":
            raise ValueError(
                f"scale=fitted fits scales of integer codes; kind={self.weights.kind} has few scales to choose from: use scale=mse"
            )
        # defaults are written into the settings, so that records, stage keys and plans show the numbers that are used
        self._fill("scale", "fitted" if fits else "mse", "gptq")
        self._fill("damping", 0.01, "gptq")
        self._fill("activation_order", True, "gptq")
        self._fill("weighted", False, "mse")
        if self.importance is not None and (self.method != "mse" or self.weighted):
            reason = "has the mean squares that weighted would measure" if self.weighted else "belongs to method=mse"
            raise ValueError(f"importance={self.importance!r} {reason}; leave one of them out")
        if self.importance is not None and self.transform is not None:
            raise ValueError(f"importance={self.importance!r} is of the inputs before transform, which changes them; leave one of them out")
        self._check_inputs()
        if self.transform is not None and self.transform.clip and self.method != "rtn":
            raise ValueError(f"transform.clip cuts weights for method=rtn; method={self.method} chooses its scales itself: leave clip out")
        observes = any(spec is not None and spec.observes for spec in (self.activations, self.kv_cache))
        if observes or (self.transform is not None and self.transform.calibrates):
            self._fill("calibration_tokens", 262_144, self.method)
        elif self.method == "mse" and not self.weighted and self.calibration_tokens is not None:
            raise ValueError(
                f"calibration_tokens={self.calibration_tokens} has no effect with method=mse unless weighted is true; leave it out"
            )
        elif self.weighted is not False:
            self._fill("calibration_tokens", 262_144, "gptq", "mse")

    @property
    def calibrates(self) -> bool:
        """Whether the stage needs calibration text: for the method, a transform, static scales, or to count outliers."""
        return self.calibration_tokens is not None

    def _fill(self, dial: str, default: object, *methods: str) -> None:
        """Set an option to its default if the method has it; refuse it if the method does not."""
        value = getattr(self, dial)
        if self.method not in methods:
            if value is not None:
                has = " and ".join(methods)
                raise ValueError(f"{dial}={_word(value)} has no effect with method={self.method}: it belongs to {has}; leave it out")
        elif value is None:
            # the dataclass is frozen, and the default depends on another field
            object.__setattr__(self, dial, default)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
