"""A recipe that is being read, as the checks across its sections see it."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..models.settings import StudentSettings, TeacherSettings
from ..trainer.settings import DataSettings, TrainerSettings
from .recipe import StageEntry


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A recipe that is being read; a section that is absent or wrong is None."""

    teacher: TeacherSettings | None
    student: StudentSettings | None
    data: DataSettings | None
    trainer: TrainerSettings | None
    stages: Sequence[StageEntry | None]
    teacher_is_known: bool
    """Whether ``teacher`` None means that the recipe has no teacher; otherwise its section is wrong."""

    @property
    def lacks_teacher(self) -> bool:
        """Return whether the recipe has no teacher."""
        return self.teacher is None and self.teacher_is_known


def key_path(entry: StageEntry, *keys: str) -> tuple[str | int, ...]:
    """Return the path of a stage's key: ``("stages", 1, "qat", "weights")``."""
    return ("stages", entry.index, entry.kind, *keys)
