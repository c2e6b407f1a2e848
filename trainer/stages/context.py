"""Inputs and results of a stage. Stages do not depend on recipes, on the order of a run or on the command line."""

from collections.abc import Mapping
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
    """Objects that all stages of a run share."""

    data: "PreparedData"
    tokenizer: "PreTrainedTokenizerBase"
    v_eff: int
    """Size of the real vocabulary. Both heads are sliced to it before the softmax."""
    trainer: TrainerSettings
    seed: int
    """Seed of the recipe."""
    teacher: TeacherRef | None
    """Teacher of the recipe. None when the recipe has no teacher, and while a scratch teacher is being trained."""
    metrics: "MetricsSink"
    console: "Console"

    def say(self, text: str, style: str = "") -> None:
        """Print a line of the run's output (rank 0)."""
        print_line(self.console, text, style)


@dataclass(frozen=True, kw_only=True)
class TrainingContext:
    """Everything that training needs from a stage, except its settings and its student."""

    run: RunContext
    name: str
    """Folder name, such as '01-distill'."""
    kind: str
    folder: Path
    """Folder of the stage, which also holds its checkpoints."""
    key: str
    """Stage key: a hash of everything else that decides the numbers of the stage."""

    def say(self, text: str) -> None:
        """Print a line of the run's output (rank 0)."""
        self.run.say(text)


@dataclass(frozen=True, kw_only=True)
class StageContext(TrainingContext):
    """Everything that a stage needs in addition to its settings."""

    input: str
    """Model folder (or hub id) that the stage starts from."""
    input_revision: str | None
    record: dict[str, Any]
    """Facts about the run that go into the decoct.json of each model folder."""
    scores: Path | None = None
    """Where scores of the input are kept; None = in the cache, for other cuts of the same model."""

    @property
    def model(self) -> Path:
        """Path of the model folder that the stage writes."""
        return self.folder / "model"


@dataclass(frozen=True)
class StudentRounders:
    """Hooks that round the inputs, keys and values of a student in training. A gathered copy of the student does not carry them."""

    inputs: "RoundedInputs | None" = None
    cache: "RoundedCache | None" = None


@dataclass
class Trained:
    """State of a training stage in memory after its last step. On rank 0 the student has all its weights."""

    student: "PreTrainedModel"
    tokens: int
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts that the stage adds to decoct.json."""
    held_out: Mapping[str, Any] | None = None
    """What the evaluations during the stage say (``trainer.loop.standing.facts``); None without one that counts."""
    samples: Mapping[str, Any] | None = None
    """What was sampled (``sample_facts``); None without samples, and on ranks other than 0."""
    terms: Mapping[str, Any] | None = None
    """Terms of the loss (``term_facts``); None for a loss on predictions alone, and on ranks other than 0."""
    texts: Mapping[str, Any] | None = None
    """Last figures of each text of a blend (``text_facts``); None for one text, and on ranks other than 0."""
    # frozen, so all may share one default
    rounders: StudentRounders = StudentRounders()
    """Hooks whose ranges are stored in the quantized folder."""

    def watched(self) -> dict[str, Any]:
        """``held_out``, ``samples``, ``terms`` and ``texts`` as facts of the stage's record, where there are any."""
        facts = {"held_out": self.held_out, "samples": self.samples, "terms": self.terms, "texts": self.texts}
        return {name: dict(fact) for name, fact in facts.items() if fact}


@dataclass
class StageResult:
    """Files and figures that a finished stage leaves."""

    model: Path | None
    """Model folder that the next stage reads; None when this stage writes no model."""
    tokens: int = 0
    seconds: float = 0.0
    exports: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts for the stage's own record and the report."""
