"""Settings of data, training and stages: plain dataclasses that ``configs/`` fills from recipes."""

from dataclasses import dataclass, field, fields
from typing import Annotated, ClassVar, Literal

from .. import Bounds, Count, check_fields
from ..losses.settings import LossSettings
from .settings_own import CallbackSettings
from .settings_samples import SamplesSettings
from .settings_text import SOURCES, BlendPart, TextSettings, labels_of
from .settings_watching import EarlyStoppingSettings
from .settings_watching import LoggerSettings as LoggerSettings

# Literals and bounds are the one source of allowed values: ``check_fields``, the loader's messages and the schema read them.
Precision = Literal["32", "bf16-mixed"]
Strategy = Literal["auto", "ddp", "fsdp2", "hsdp"]
ChosenStrategy = Literal["ddp", "fsdp2", "hsdp"]
"""A strategy that a stage trains with."""
Optimizer = Literal["adamw", "adamw-8bit", "paged-adamw-8bit"]
Share = Annotated[float, Bounds(ge=0, le=1)]
ShareOfSteps = Annotated[float, Bounds(ge=0, lt=1, why="it is a share of the steps")]
Rate = Annotated[float, Bounds(gt=0)]
Moment = Annotated[float, Bounds(ge=0, lt=1)]
NotNegative = Annotated[float, Bounds(ge=0)]
Result = Literal["last", "best"]


@dataclass(frozen=True, kw_only=True)
class DataSettings(TextSettings):
    """The text of a run: exactly one of ``builtin``, ``files``, ``hub``, ``generate``, ``source`` and ``blend``."""

    exactly_one: ClassVar[tuple[str, ...]] = (*SOURCES, "blend")

    blend: tuple[BlendPart, ...] | None = None
    """Several texts, each with its own source, kind and weight; windows of all parts are mixed in these shares, and every stretch of the
    order has them."""
    seq_length: Annotated[int, Bounds(ge=2, why="a window of one token predicts nothing")] = 512
    """Tokens per training and evaluation window."""
    packing: bool = True
    """Concatenate documents, separated by end-of-text, into full windows. Otherwise each window holds one document, padded."""
    eval_tokens: int | Literal["all"] = 32_768
    """Tokens held out for evaluation: whole documents that are never trained on, or parts of long ones (held_out). all = the whole text,
    where no stage trains on it."""
    held_out: Literal["blocks", "end"] | None = None
    """What is held out of documents that are too long to be held out whole: blocks = windows from all over the text, chosen by the hash of
    their tokens; end = the last tokens of the text. Conversations are never cut into blocks. Default: blocks; a run folder that was begun
    before there were blocks keeps its split."""

    def __post_init__(self) -> None:
        self._check_text("data")
        if self.blend:
            self._check_blend(self.blend)
        if self.kind == "chat" and self.held_out == "blocks":
            raise ValueError("held_out=blocks would do nothing: conversations are never cut into blocks; leave it out")
        # checked here and not with the text: it fails before anything is read or downloaded
        if self.eval_tokens != "all" and self.eval_tokens < self.seq_length:
            raise ValueError(f"eval_tokens={self.eval_tokens} is shorter than one window of seq_length={self.seq_length}; raise it")

    def _check_blend(self, parts: tuple[BlendPart, ...]) -> None:
        """Raise ValueError where the parts do not fit each other or the keys beside them."""
        beside = [entry.name for entry in fields(TextSettings) if getattr(self, entry.name) != entry.default]
        if beside:
            raise ValueError(
                f"{beside[0]}={getattr(self, beside[0])!r} has no effect beside blend; each part has a key {beside[0]} of its own"
            )
        if len({part.weight is None for part in parts}) > 1:
            raise ValueError("blend has parts with 'weight' and parts with 'tokens'; give all parts the same of the two")
        named = labels_of(parts)
        if twice := next((name for name in named if named.count(name) > 1), None):
            raise ValueError(f"blend has two parts of the name {twice!r}; names tell parts apart in metrics and report")
        for number, part in enumerate(parts):
            if part.eval_tokens is not None and self.eval_tokens == "all":
                raise ValueError(
                    f"blend: part {number} has eval_tokens={part.eval_tokens}, and eval_tokens beside blend is 'all'; remove one"
                )
            if part.eval_tokens is not None and part.eval_tokens < self.seq_length:
                shorter = f"shorter than one window of seq_length={self.seq_length}"
                raise ValueError(f"blend: part {number} has eval_tokens={part.eval_tokens}, {shorter}; raise it")

    @property
    def texts(self) -> "dict[str, DataSettings]":
        """Each text by itself, by the name of its part; the whole, under '', without a blend."""
        if not self.blend:
            return {"": self}
        found: dict[str, DataSettings] = {}
        for name, part in zip(labels_of(self.blend), self.blend):
            own = part.part.options if part.part else ()
            made = part.whole or DataSettings
            found[name] = made(
                **{key: getattr(part, key) for key in (*(entry.name for entry in fields(TextSettings)), *own)},
                seq_length=self.seq_length,
                packing=self.packing,
                eval_tokens=part.eval_tokens or self.eval_tokens,
                # conversations are never cut into blocks, whatever the other parts are
                held_out=None if part.kind == "chat" else self.held_out,
            )
        return found

    @property
    def has_chats(self) -> bool:
        """Whether any of the text is conversations."""
        return any(text.kind == "chat" for text in self.blend or (self,))

    @property
    def reads_control_tokens(self) -> bool:
        """Whether spelled-out control tokens in the data become control tokens (``special_tokens``)."""
        return self.special_tokens == "control" or (self.special_tokens == "auto" and self.kind == "text")

    @property
    def held_out_rule(self) -> Literal["blocks", "end"]:
        """``held_out`` with its default, and as it applies to this kind of text."""
        # samples of one conversation share their beginnings: a block of one would be trained on in another
        return "end" if self.kind == "chat" else self.held_out or "blocks"


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How training stages run. Devices, strategy and logging do not change a stage's numbers; everything else does."""

    # 1024 bounds typing errors only; a run checks at its start how many devices the machine has.
    devices: Annotated[int, Bounds(ge=1, le=1024)] | Literal["auto"] = "auto"
    """Processes on this machine. auto = one per GPU, or one process on a CPU."""
    strategy: Strategy = "auto"
    """How several processes share the work: ddp = each holds the whole student; fsdp2 = each holds a share of it; hsdp = those of a
    machine hold it together, so that weights are gathered inside machines alone (on one machine the same as fsdp2); auto = fsdp2 when ddp
    would not fit on the GPUs at hand."""
    activation_checkpointing: bool = False
    """Keep one activation per layer and recompute the rest in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile each decoder layer with torch.compile. The first step takes long; a C++ compiler is needed."""
    optimizer: Optimizer = "adamw"
    """adamw = fp32 moments; adamw-8bit and paged-adamw-8bit = bitsandbytes, 2 bytes of moments per weight. The paged one moves them to host
    memory when the GPU is full."""
    precision: Precision = "bf16-mixed"
    """bf16-mixed keeps fp32 master weights; losses are fp32 in both."""
    global_batch_tokens: Count = 65_536
    """Tokens per optimizer step over all micro-batches and ranks; a multiple of seq_length."""
    micro_batch: Count | Literal["auto"] = "auto"
    """Windows per forward pass and rank. auto = the largest number that fits into 8,192 tokens and divides the global batch."""
    gradient_clip: NotNegative = 1.0
    """Largest global gradient norm: larger gradients are scaled down to it. 0 turns clipping off."""
    num_workers: Annotated[int, Bounds(ge=0, le=1024)] = 0
    """Data loader worker processes per rank."""
    save_dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of the weights in model folders. Quantized folders are always fp32, because codes times scales are not bf16 numbers."""
    deterministic: bool = True
    """Use deterministic algorithms, so that a resumed run ends in the same bits."""
    evaluate_every: Annotated[int, Bounds(ge=0)] | Literal["auto"] = "auto"
    """Optimizer steps between evaluations on a small part of the held-out text. auto = about eight evaluations per stage, on as much text
    as costs about two percent of its time; 0 = never. It changes no number of the training, except where a stage asks for it (result: best,
    early_stopping); then on at least 4,096 tokens."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class TrainingBlock:
    """Settings of every stage that trains. Give ``tokens`` or ``steps``."""

    tokens: Count | None = None
    """Training tokens, rounded up to whole optimizer steps."""
    steps: Count | None = None
    """Optimizer steps."""
    learning_rate: Rate | None = None
    """Peak learning rate. Default: derived from the kind of stage, the model and, for distill, the KL at the start; it is printed."""
    warmup: ShareOfSteps | None = None
    """Share of the steps over which the rate rises linearly. Default: 5%, at least 8 steps, at most half of the steps."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    final_learning_rate: Share = 0.1
    """Learning rate of the last step, as a share of the peak rate."""
    weight_decay: NotNegative = 0.0
    """AdamW decay of matrices. Norms, biases and embeddings never decay."""
    betas: tuple[Moment, Moment] = (0.9, 0.95)
    """AdamW betas of the first and second moment."""
    loss: LossSettings = field(default_factory=LossSettings)
    """Divergence from the teacher, temperature, and weight of the labels of the text."""
    teacher: Literal["recipe", "input"] | None = None
    """Model whose predictions are learned: recipe = the recipe's teacher; input = this stage's input model. Default: recipe if there is
    a teacher."""
    checkpoint_every: Count | None = None
    """Optimizer steps between checkpoints. Default: a twentieth of the stage, at least 10."""
    result: Result = "last"
    """Weights that the stage's model folder is made of: last = those after the last step; best = those of the evaluation with the lowest
    held-out KL (held-out loss without a teacher), whose checkpoint is kept too."""
    early_stopping: EarlyStoppingSettings | None = None
    """End the stage before its last step when held-out figures no longer get better. Default: never."""
    samples: SamplesSettings | None = None
    """Text that the student or the teacher writes while the stage trains, in place of a share of the given text. Default: the given text
    alone."""
    callbacks: tuple[CallbackSettings, ...] = ()
    """Callbacks that the recipe imports (import), by name or as sections with a name and options."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tokens is not None and self.steps is not None:
            raise ValueError("give 'tokens' or 'steps', not both")
        names = [callback.name for callback in self.callbacks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"callbacks={names} names {twice} twice")

    @property
    def selects(self) -> bool:
        """Whether evaluations during the stage decide which weights it ends with."""
        return self.result == "best" or self.early_stopping is not None


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(TrainingBlock):
    """Train on the text itself (cross-entropy), without a teacher."""


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainingBlock):
    """Train the student to predict what the teacher predicts."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Pack a quantized folder for serving stacks. Export never rounds, except with ``allow_inexact``."""

    formats: tuple[
        Literal[
            "compressed-tensors",
            "gguf",
            "gguf-q2_0",
            "gguf-tq1_0",
            "gptq",
            "gptq_v2",
            "awq",
            "bitsandbytes",
            "safetensors",
            "safetensors-f32",
        ],
        ...,
    ] = ("compressed-tensors",)
    """Formats to write, each into its own folder: compressed-tensors (vLLM, SGLang, transformers), gguf (llama.cpp, Ollama), gguf-q2_0
    (2 bits, llama.cpp from July 2026 on), gguf-tq1_0 (ternary codes in the smaller of two forms), gptq (symmetric) or gptq_v2 (asymmetric),
    awq (4 bits), bitsandbytes (int8 with int8 inputs, or NF4), safetensors (plain 16-bit floats), safetensors-f32 (plain 32-bit floats,
    always exact)."""
    allow_inexact: bool = False
    """safetensors: round weights that 16-bit floats cannot hold. The error is measured and reported. Nothing else is ever rounded."""
    reader_version: str | None = None
    """compressed-tensors with 3, 5, 6 or 7 bits: version of the compressed-tensors package that will read the export, at least 0.18.0
    (earlier versions use another layout)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.formats:
            raise ValueError("formats=[] names no format; name one or more, or leave the stage out")
        twice = next((name for name in self.formats if self.formats.count(name) > 1), None)
        if twice:
            raise ValueError(f"formats={list(self.formats)} names {twice} twice")
        if self.reader_version is not None and "compressed-tensors" not in self.formats:
            raise ValueError(f"reader_version={self.reader_version} applies only to compressed-tensors, which is not among the formats")
        if self.allow_inexact and "safetensors" not in self.formats:
            raise ValueError("allow_inexact=true applies only to safetensors, which is not among the formats; nothing else is ever rounded")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Measure the model. When a gate is not met, the run ends here, with the report and exit code 3."""

    max_perplexity_increase: Annotated[float, Bounds(ge=-1)] | None = None
    """Gate: largest allowed perplexity(model) / perplexity(teacher) - 1; 5% is 0.05."""
    max_kl: NotNegative | None = None
    """Gate: largest allowed mean KL(teacher || model), in nats."""
    min_top1: Share | None = None
    """Gate: smallest allowed top-1 agreement with the teacher."""
    round_teacher: bool = True
    """Also quantize the teacher as the recipe quantizes the student, without training, and report it for comparison."""
    tasks: tuple[str, ...] = ()
    """Tasks to score the model and the teacher on: cloze (last words of sentences of the held-out text), files of questions and answers
    (.jsonl), and with lm-eval installed names that it knows or YAML files of tasks. Default: none."""
    task_shots: Annotated[int, Bounds(ge=0, le=100)] | None = None
    """Solved examples before each item. Default: 4 for a .jsonl file, in lm-eval the task's own number."""
    task_limit: Count | None = None
    """Items of each task at most. Default: all."""
    task_batch: Count | Literal["auto"] = "auto"
    """Sequences per forward pass in tasks. auto = as many as fit into 4,096 tokens."""
    task_seed: Annotated[int, Bounds(ge=0, le=2**32 - 1)] = 0
    """Seed of the choice of items and examples in tasks."""
    min_task: dict[str, NotNegative] | None = None
    """Gate: smallest allowed score of each task, as a share of the teacher's: {cloze: 95%}."""
    samples: Annotated[int, Bounds(ge=0, le=20)] = 3
    """Beginnings of held-out text from which teacher and model go on in the report, greedily. 0 = none."""
    sample_prompts: tuple[str, ...] = ()
    """Texts to go on from, in place of held-out text."""
    sample_tokens: Annotated[int, Bounds(ge=1, le=1000)] = 24
    """Tokens of each sample at most."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.tasks:
            given = [name for name in ("task_shots", "task_limit", "min_task") if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{given[0]} is for tasks, and there are none; name some, such as tasks: [cloze]")
        twice = next((name for name in self.tasks if self.tasks.count(name) > 1), None)
        if twice:
            raise ValueError(f"tasks={list(self.tasks)} names {twice} twice")
