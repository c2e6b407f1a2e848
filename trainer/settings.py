"""What a user may choose about data, training and stages (plain data; ``configs/`` validates it)."""

from dataclasses import dataclass, field
from typing import Literal

from ..losses.settings import LossSettings
from ..qat.spec import ActivationSpec, QuantSpec

Precision = Literal["32", "bf16-mixed"]
Strategy = Literal["auto", "ddp", "fsdp2"]
Optimizer = Literal["adamw", "adamw-8bit", "paged-adamw-8bit"]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The text of a run: exactly one of ``builtin``, ``files`` and ``hub``."""

    builtin: Literal["python-stdlib"] | None = None
    """Text found on any machine: the sorted .py files of the running Python's standard library, first 8 MB."""
    files: tuple[str, ...] | None = None
    """Local .txt, .jsonl or .parquet files; globs allowed, relative to the working directory."""
    hub: str | None = None
    """Hugging Face dataset id."""
    hub_config: str | None = None
    """Configuration name of the hub dataset."""
    hub_split: str = "train"
    """Split of the hub dataset."""
    kind: Literal["text", "chat"] = "text"
    """text = documents; chat = rows of messages, or of prompt and completion, through the tokenizer's chat template."""
    mask_prompts: bool = True
    """chat: learn what the assistant says and nothing else."""
    text_field: str = "text"
    """Column or JSON key that holds the text (jsonl, parquet, hub)."""
    seq_length: int = 512
    """Tokens per training and evaluation window."""
    packing: bool = True
    """Concatenate documents (separated by end-of-text) into full windows; otherwise one document a window, padded."""
    eval_tokens: int = 32_768
    """Tokens held out for evaluation (whole documents, never trained on)."""
    max_documents: int | None = None
    """Read at most this many documents."""

    def __post_init__(self) -> None:
        given = [name for name in ("builtin", "files", "hub") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"data needs exactly one of 'builtin', 'files' and 'hub'; given: {given or 'none'}")
        if self.kind == "chat" and self.builtin:
            raise ValueError("kind=chat needs rows of conversations, and builtin text has none; give 'files' or 'hub'")
        if self.kind == "text" and not self.mask_prompts:
            raise ValueError("mask_prompts=false would do nothing: text has no prompts; set kind: chat, or leave it out")
        if self.seq_length < 2:
            raise ValueError(f"seq_length={self.seq_length} must be at least 2: a window of one token predicts nothing")
        if self.eval_tokens < self.seq_length:
            raise ValueError(f"eval_tokens={self.eval_tokens} is shorter than one window of seq_length={self.seq_length}; raise it")


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How training stages run. Devices, strategy and logging do not change a stage's numbers; the rest does."""

    devices: int | Literal["auto"] = "auto"
    """Processes on this machine; auto = all GPUs, or one process on a CPU."""
    strategy: Strategy = "auto"
    """How several processes share the work: ddp = each holds the whole student, fsdp2 = each holds a share of it; auto = fsdp2 when ddp
    would not fit on the GPUs at hand."""
    activation_checkpointing: bool = False
    """Keep one activation a layer and compute the rest again in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile each decoder layer (the first step takes long; needs a C++ compiler)."""
    optimizer: Optimizer = "adamw"
    """adamw = fp32 moments; adamw-8bit and paged-adamw-8bit = bitsandbytes, 2 bytes of moments a weight, the paged one in host memory
    when the GPU is full."""
    precision: Precision = "bf16-mixed"
    """bf16-mixed keeps fp32 master weights; losses are fp32 in both."""
    global_batch_tokens: int = 65_536
    """Tokens per optimizer step over all micro-batches and ranks (a multiple of seq_length)."""
    micro_batch: int | Literal["auto"] = "auto"
    """Windows per forward pass and rank; auto = the largest that fits 8,192 tokens and divides the global batch."""
    gradient_clip: float = 1.0
    """Global gradient norm after which gradients are scaled down; 0 switches clipping off."""
    num_workers: int = 0
    """Data loader worker processes per rank."""
    save_dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of the weights in model folders (quantized folders are fp32: codes times scales are not bf16 numbers)."""
    deterministic: bool = True
    """Deterministic algorithms, so that a resumed run ends in the same bits."""


@dataclass(frozen=True, kw_only=True)
class TrainingBlock:
    """Settings shared by every stage that trains; give ``tokens`` or ``steps``."""

    tokens: int | None = None
    """Training tokens; rounded up to whole optimizer steps."""
    steps: int | None = None
    """Optimizer steps."""
    learning_rate: float | None = None
    """Peak learning rate; default: derived per stage kind and printed."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises linearly, [0, 1)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    final_learning_rate: float = 0.1
    """Share of the peak rate kept at the last step, [0, 1]."""
    weight_decay: float = 0.0
    """AdamW decay of matrices (never of norms, biases and embeddings)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moments."""
    loss: LossSettings = field(default_factory=LossSettings)
    """Divergence to the teacher, temperature, hard-label weight."""
    teacher: Literal["recipe", "input"] | None = None
    """Whose predictions to learn: the recipe's teacher, or this stage's own input model. Default: recipe, if there is one."""
    checkpoint_every: int | None = None
    """Optimizer steps between checkpoints; default: a twentieth of the stage, at least 10."""

    def __post_init__(self) -> None:
        if self.tokens is not None and self.steps is not None:
            raise ValueError("give 'tokens' or 'steps', not both")
        for name in ("tokens", "steps", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(TrainingBlock):
    """Train on the text itself (cross-entropy), without a teacher."""


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainingBlock):
    """Train the student to predict what the teacher predicts."""


@dataclass(frozen=True, kw_only=True)
class StructuredSettings:
    """Remove whole channels, so that the dense model is smaller. Numbers state what is kept."""

    ffn: int
    """FFN channels kept in every layer."""


@dataclass(frozen=True, kw_only=True)
class MagnitudeSettings:
    """Set the smallest weights of the decoder's linear layers to zero, along a cubic schedule (Zhu & Gupta 2017)."""

    keep: float
    """Share of these weights that stays, (0, 1)."""
    scope: Literal["layer", "global"] = "layer"
    """Choose inside each matrix, or over all of them (each normalised by its mean magnitude)."""
    update_every: int = 10
    """Optimizer steps between mask updates."""
    heal: float = 0.25
    """Share of the steps, at the end, with the final mask."""

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"keep={self.keep} must lie strictly between 0 and 1: it is the share of weights that stays")
        if self.update_every < 1 or not 0 <= self.heal < 1:
            raise ValueError("update_every must be at least 1 and heal must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class PruneSettings(TrainingBlock):
    """Exactly one of ``structured`` (one shot, on calibration text) and ``magnitude`` (trains when tokens or steps are given)."""

    structured: StructuredSettings | None = None
    """Channels to keep."""
    magnitude: MagnitudeSettings | None = None
    """Weights to keep."""
    calibration_tokens: int = 32_768
    """Training text that structured pruning scores channels on."""

    def __post_init__(self) -> None:
        TrainingBlock.__post_init__(self)
        if (self.structured is None) == (self.magnitude is None):
            raise ValueError("a prune stage needs exactly one of 'structured' and 'magnitude'")
        if self.structured is not None and (self.tokens is not None or self.steps is not None):
            raise ValueError("structured pruning is one shot and takes no 'tokens' or 'steps'; add a distill stage after it")


@dataclass(frozen=True, kw_only=True)
class QatSettings(TrainingBlock):
    """Train with weights rounded in the forward pass; ends in codes and scales ready to pack."""

    weights: QuantSpec = field(default_factory=QuantSpec)
    """The weight lattice."""
    skip: tuple[str, ...] = ()
    """Module name patterns (fnmatch) left in full precision; one that matches nothing is an error. lm_head and embeddings always are."""
    activations: ActivationSpec | None = None
    """How the inputs of these layers are rounded, such as {kind: int8}; default: not at all."""
    scales: Literal["learned", "absmax"] = "learned"
    """learned = trained beside the weights (LSQ); absmax = taken anew from the weights in every forward."""
    scale_learning_rate: float | None = None
    """Peak rate of learned scales; default: a thirtieth of the others'."""
    start: Literal["rtn", "mse", "gptq"] | None = None
    """First scales (and, for gptq, weights): from the largest magnitude, searched for the smallest squared error, or by GPTQ on training
    text. Default: mse, or rtn with absmax scales."""
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
    calibration_tokens: int = 131_072
    """start: gptq: training text that it looks at."""

    def __post_init__(self) -> None:
        TrainingBlock.__post_init__(self)
        self.weights.check_storable()
        if self.train == "scales" and self.scales != "learned":
            raise ValueError("train=scales trains the scales and nothing else: it needs scales=learned")
        searched = self.start not in (None, "rtn")
        if self.scales == "absmax" and (searched or self.scale_learning_rate is not None):
            key = "start" if searched else "scale_learning_rate"
            raise ValueError(f"{key} does nothing with scales=absmax, which are taken anew in every forward; use scales=learned")
        self._check_schedule()
        self._check_trained()

    @property
    def first(self) -> Literal["rtn", "mse", "gptq"]:
        """``start``, or what stands for it."""
        return self.start or ("mse" if self.scales == "learned" else "rtn")

    def _check_schedule(self) -> None:
        for name in ("delay", "anneal", "freeze_scales"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1): it is a share of the steps")
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
class QuantizeSettings:
    """Round without training.

    What is not given is filled in, except dials that the chosen method does not have: those stay None, and giving one is an error.
    """

    weights: QuantSpec = field(default_factory=QuantSpec)
    """The weight lattice."""
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
    """gptq, and mse with weighted: tokens of training text to calibrate on, in windows chosen at random, default 262,144: the 128
    windows of 2,048 of the GPTQ paper (section 4), several times the inputs of the widest layers; fewer when the text has fewer."""
    stream: Literal["auto", "always", "never"] = "auto"
    """Read, round and write one decoder layer after the other, for models larger than memory: the same result, more disk; auto = when
    memory is too small for the whole model in fp32."""
    skip: tuple[str, ...] = ()
    """As in qat."""

    def __post_init__(self) -> None:
        self.weights.check_storable()
        self._fill("scale", "fitted", "gptq")
        self._fill("damping", 0.01, "gptq")
        self._fill("activation_order", True, "gptq")
        self._fill("weighted", False, "mse")
        if self.method == "mse" and not self.weighted and self.calibration_tokens is not None:
            raise ValueError(
                f"calibration_tokens={self.calibration_tokens} does nothing with method=mse unless weighted is true; leave it out"
            )
        if self.weighted is not False:
            self._fill("calibration_tokens", 262_144, "gptq", "mse")
        if self.damping is not None and not 0 <= self.damping <= 1:
            raise ValueError(f"damping={self.damping:g} must lie in [0, 1]: it is a share of the Hessian's mean diagonal; 0.01 is usual")

    @property
    def calibrates(self) -> bool:
        """Whether the method looks at text."""
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


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Pack a quantized folder for serving stacks; never rounds."""

    formats: tuple[Literal["compressed-tensors", "gguf", "gptq", "gptq_v2", "awq", "safetensors"], ...] = ("compressed-tensors",)
    """Formats to write, each into its own folder: compressed-tensors (vLLM, SGLang, transformers), gguf (llama.cpp, Ollama), gptq
    (symmetric) or gptq_v2 (asymmetric), awq (4 bits), safetensors (plain 16-bit floats)."""
    allow_inexact: bool = False
    """Let safetensors round weights that 16-bit floats do not hold; the error is measured and reported. Nothing else is ever rounded."""
    reader_version: str | None = None
    """compressed-tensors of 3, 5, 6 or 7 bits: version of the package that will read it, at least 0.18.0 (earlier ones pack otherwise)."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Measure, and stop with exit code 3 when a gate is not met."""

    max_perplexity_increase: float | None = None
    """Largest allowed perplexity(model) / perplexity(teacher) - 1; 5% is 0.05."""
    max_kl: float | None = None
    """Largest allowed mean KL(teacher || model) in nats."""
    min_top1: float | None = None
    """Smallest allowed top-1 agreement with the teacher, in [0, 1]."""
    round_teacher: bool = True
    """Also round the teacher with the recipe's QuantSpec (no training) and report it, for scale."""


@dataclass(frozen=True, kw_only=True)
class LoggerSettings:
    """Where curves go besides the run folder's ``metrics.jsonl``. ``logger: wandb`` is short for ``logger: {kind: wandb}``."""

    kind: Literal["wandb", "csv", "none"] = "none"
    """wandb (offline when there is no key), csv = files in the run folder, none = metrics.jsonl alone."""
    project: str | None = None
    """W&B project; default: WANDB_PROJECT, then 'decoct'. Unused by csv and none, as are the next three."""
    entity: str | None = None
    """W&B user or team; default: the account's own."""
    group: str | None = None
    """W&B group that the run is shown in."""
    tags: tuple[str, ...] = ()
    """W&B tags."""
