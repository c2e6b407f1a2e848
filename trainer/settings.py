"""What a user may choose about data, training and stages (plain data; ``configs/`` validates it)."""

from dataclasses import dataclass, field
from typing import Literal

from ..losses.settings import LossSettings

Precision = Literal["32", "bf16-mixed"]
Strategy = Literal["auto", "ddp", "fsdp2"]
Optimizer = Literal["adamw", "adamw-8bit", "paged-adamw-8bit"]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The text of a run: exactly one of ``builtin``, ``files`` and ``hub``."""

    builtin: Literal["python-stdlib"] | None = None
    """Text found on any machine: the sorted .py files of the running Python's standard library, first 8 MB."""
    files: tuple[str, ...] | None = None
    """Local files (txt, md, jsonl, json, csv, tsv, parquet; packed as gz, bz2, xz or zst), globs or folders."""
    hub: str | None = None
    """Hugging Face dataset id."""
    hub_config: str | None = None
    """Configuration name of the hub dataset."""
    hub_split: str = "train"
    """Split of the hub dataset."""
    kind: Literal["text", "chat"] = "text"
    """text = documents; chat = rows of messages, or of prompt and completion and the like, through the tokenizer's chat template."""
    mask_prompts: bool = True
    """chat: learn what the assistant says and nothing else."""
    text_field: str = "text"
    """Column or JSON key that holds the text (jsonl, json, csv, parquet, hub)."""
    special_tokens: Literal["auto", "text", "control"] = "auto"
    """What a control token is that the data spells (``<|im_end|>``): text, or the token; auto = text in chats, the token in documents."""
    seq_length: int = 512
    """Tokens per training and evaluation window."""
    packing: bool = True
    """Concatenate documents (separated by end-of-text) into full windows; otherwise one document a window, padded."""
    eval_tokens: int | Literal["all"] = 32_768
    """Tokens held out for evaluation (whole documents, never trained on); all = the whole text, where no stage learns from it."""
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
        if self.eval_tokens != "all" and self.eval_tokens < self.seq_length:
            raise ValueError(f"eval_tokens={self.eval_tokens} is shorter than one window of seq_length={self.seq_length}; raise it")

    @property
    def reads_control_tokens(self) -> bool:
        """Whether control tokens that the data spells are read as such."""
        return self.special_tokens == "control" or (self.special_tokens == "auto" and self.kind == "text")


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
    evaluate_every: int | Literal["auto"] = "auto"
    """Optimizer steps between evaluations on a small part of the held-out text; auto = about eight a stage, on as much text as costs some
    two percent of its time; 0 = never. Changes no number of the training."""


@dataclass(frozen=True, kw_only=True)
class TrainingBlock:
    """Settings shared by every stage that trains; give ``tokens`` or ``steps``."""

    tokens: int | None = None
    """Training tokens; rounded up to whole optimizer steps."""
    steps: int | None = None
    """Optimizer steps."""
    learning_rate: float | None = None
    """Peak learning rate; default: derived per stage kind and printed."""
    warmup: float | None = None
    """Share of the steps over which the rate rises linearly, [0, 1). Default: 5%, at least 8 steps, at most half."""
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
    """Training text that structured pruning scores channels on: windows from all over it, chosen by the seed as in quantize."""
    allow_partial: bool = False
    """magnitude: go on where less than 95 % of the decoder's weights are in linears; the others keep all their weights."""

    def __post_init__(self) -> None:
        TrainingBlock.__post_init__(self)
        if (self.structured is None) == (self.magnitude is None):
            raise ValueError("a prune stage needs exactly one of 'structured' and 'magnitude'")
        if self.structured is not None and (self.tokens is not None or self.steps is not None):
            raise ValueError("structured pruning is one shot and takes no 'tokens' or 'steps'; add a distill stage after it")


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Pack a quantized folder for serving stacks; never rounds."""

    formats: tuple[Literal["compressed-tensors", "gguf", "gguf-q2_0", "gptq", "gptq_v2", "awq", "safetensors", "safetensors-f32"], ...] = (
        "compressed-tensors",
    )
    """Formats to write, each into its own folder: compressed-tensors (vLLM, SGLang, transformers), gguf (llama.cpp, Ollama), gguf-q2_0
    (2 bits in llama.cpp from July 2026 on), gptq (symmetric) or gptq_v2 (asymmetric), awq (4 bits), safetensors (plain 16-bit floats),
    safetensors-f32 (plain, always exact)."""
    allow_inexact: bool = False
    """Let safetensors round weights that 16-bit floats do not hold; the error is measured and reported. Nothing else is ever rounded."""
    reader_version: str | None = None
    """compressed-tensors of 3, 5, 6 or 7 bits: version of the package that will read it, at least 0.18.0 (earlier ones pack otherwise)."""

    def __post_init__(self) -> None:
        twice = next((name for name in self.formats if self.formats.count(name) > 1), None)
        if twice:
            raise ValueError(f"formats={list(self.formats)} names {twice} twice")
        if self.reader_version is not None and "compressed-tensors" not in self.formats:
            raise ValueError(f"reader_version={self.reader_version} is read by compressed-tensors alone, which formats does not name")
        if self.allow_inexact and "safetensors" not in self.formats:
            raise ValueError("allow_inexact=true is for safetensors alone, which formats does not name; nothing else is ever rounded")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Measure, and end the run here, with the report and exit code 3, when a gate is not met."""

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
