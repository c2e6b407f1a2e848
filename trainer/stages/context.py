"""What a stage is given and what it gives back. Stages know nothing of recipes, run order or the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.settings import CacheSettings, LoadIn, Placement, ServedSettings
from ..settings import TrainerSettings

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.prepared_data import PreparedData
    from ..loop.metrics import MetricsSink


@dataclass(frozen=True, kw_only=True)
class TeacherRef:
    """A teacher that can be opened again by every stage and rank."""

    path: str
    """Model folder or hub id."""
    load_in: LoadIn
    """How its weights are held while training."""
    placement: Placement
    """Where they are held while training."""
    revision: str | None
    name: str
    """What reports and cards call it (never a local path)."""
    content: str
    """Content hash of its folder."""
    cache: CacheSettings | None = None
    """What of it is kept on disk and trained from; None = it runs beside the student."""
    served: ServedSettings | None = None
    """Server that predicts in its place."""


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """Everything outside a stage's own settings."""

    name: str
    """Folder name, such as '01-distill'."""
    kind: str
    folder: Path
    """The stage's folder; the model folder it writes is ``folder / 'model'``."""
    input: str
    """Model folder (or hub id) that the stage starts from."""
    input_revision: str | None
    record: dict[str, Any]
    """What every model folder of this run says about its origin (decoct.json)."""
    teacher: TeacherRef | None
    data: "PreparedData"
    tokenizer: "PreTrainedTokenizerBase"
    v_eff: int
    """Real vocabulary: both heads are sliced to it before the softmax."""
    trainer: TrainerSettings
    seed: int
    key: str
    metrics: "MetricsSink"
    console: "Console"

    @property
    def model(self) -> Path:
        """Where the stage's model folder goes."""
        return self.folder / "model"

    def say(self, text: str) -> None:
        """A line of the run's output (rank 0); names in it are never taken for markup, and a log gets it in one piece."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


@dataclass
class Trained:
    """What a training stage holds in memory when its last step is done; rank 0's student has all its weights."""

    student: "PreTrainedModel"
    tokens: int
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    """What the stage adds to decoct.json."""


@dataclass
class StageResult:
    """What a finished stage left on disk."""

    model: Path | None
    """Model folder that the next stage reads; None when this stage makes none."""
    tokens: int = 0
    seconds: float = 0.0
    exports: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
