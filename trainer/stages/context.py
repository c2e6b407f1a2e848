"""What a stage is given and what it gives back. Stages know nothing of recipes, run order or the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.teachers import TeacherRef
from ..progress import print_line
from ..settings import TrainerSettings

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...qat.layers.input_hooks import RoundedInputs
    from ...qat.layers.kv_cache_hooks import RoundedCache
    from ..data.prepared_data import PreparedData
    from ..loop.metrics import MetricsSink


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What all stages of a run share."""

    data: "PreparedData"
    tokenizer: "PreTrainedTokenizerBase"
    v_eff: int
    """Real vocabulary: both heads are sliced to it before the softmax."""
    trainer: TrainerSettings
    seed: int
    """The recipe's."""
    teacher: TeacherRef | None
    """The recipe's; None when it has none, and while a scratch teacher is still trained."""
    metrics: "MetricsSink"
    console: "Console"

    def say(self, text: str, style: str = "") -> None:
        """Print a line of the run's output (rank 0)."""
        print_line(self.console, text, style)


@dataclass(frozen=True, kw_only=True)
class TrainingContext:
    """What training needs to know of a stage besides its settings and its student."""

    run: RunContext
    name: str
    """Folder name, such as '01-distill'."""
    kind: str
    folder: Path
    """The stage's folder; its checkpoints go there."""
    key: str
    """The stage key: what else decides the stage's numbers."""

    def say(self, text: str) -> None:
        """Print a line of the run's output (rank 0)."""
        self.run.say(text)


@dataclass(frozen=True, kw_only=True)
class StageContext(TrainingContext):
    """Everything outside a stage's own settings."""

    input: str
    """Model folder (or hub id) that the stage starts from."""
    input_revision: str | None
    record: dict[str, Any]
    """What every model folder of this run says about its origin (decoct.json)."""

    @property
    def model(self) -> Path:
        """Where the stage's model folder goes."""
        return self.folder / "model"


@dataclass(frozen=True)
class StudentRounders:
    """The hooks that round a student's inputs, keys and values while it trains; a gathered copy of the student has none of them."""

    inputs: "RoundedInputs | None" = None
    cache: "RoundedCache | None" = None


@dataclass
class Trained:
    """What a training stage holds in memory when its last step is done; rank 0's student has all its weights."""

    student: "PreTrainedModel"
    tokens: int
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    """What the stage adds to decoct.json."""
    rounders: StudentRounders = StudentRounders()
    """Whose ranges a quantized folder is to hold."""


@dataclass
class StageResult:
    """What a finished stage left on disk."""

    model: Path | None
    """Model folder that the next stage reads; None when this stage makes none."""
    tokens: int = 0
    seconds: float = 0.0
    exports: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
