"""The recipe: one typed value with all settings of a run. ``loader.py`` makes it from YAML."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from .. import Bounds, recipe_key
from ..models.settings import StudentSettings, TeacherSettings
from ..trainer.settings import DataSettings, LoggerSettings, TrainerSettings
from .own_parts import PartsFile

Seed = Annotated[int, Bounds(ge=0, le=2**32 - 1)]


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """One stage of a recipe."""

    kind: str
    """A key of ``trainer.stages.registry.STAGE_KINDS``, or the name of an imported stage."""
    name: str
    """``NN-<label>``, NN counted from 01: name of the stage's folder, unique in the recipe."""
    settings: Any
    """The kind's settings dataclass."""
    index: int
    """Position in ``stages``, counted from 0, as overrides address it."""

    @property
    def label(self) -> str:
        """Return the stage's ``name`` in the recipe, or its kind."""
        return self.name.partition("-")[2]


def stage_name(index: int, label: str) -> str:
    """Return the folder name of the stage at ``index`` (from 0): '01-distill' for the first."""
    return f"{index + 1:02d}-{label}"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Teacher, student, text, stages in order, and how to train and log them."""

    name: str
    """Name of the run and of its folder: letters, digits, '.', '_' and '-'. Default: the recipe file's name without its ending."""
    student: StudentSettings
    """The model to work on."""
    data: DataSettings
    """The text to train and measure on."""
    stages: tuple[StageEntry, ...]
    """What to do, in order. Each stage is a kind, alone or with its settings below it."""
    imports: tuple[PartsFile, ...] = ()
    """Python files with parts of your own (divergences, data sources, stages, callbacks), which the recipe may then name. They are run; a
    path is relative to the recipe's folder. In a recipe the key is `import`."""
    teacher: TeacherSettings | None = None
    """The model to learn from, and to compare with. Default: none."""
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    """How training stages run."""
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    """Where curves go in addition to the run folder's files."""
    seed: Seed = 0
    """Seed of everything random: initial weights, order of the data, split into training and evaluation."""


def resolved(recipe: Recipe, imports: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the recipe as plain data with every default filled in; ``recipe_from_dict`` turns it into an equal Recipe.

    Args:
        recipe: The recipe.
        imports: Paths of the imported files, in place of those that it was read with.
    """
    plain: dict[str, Any] = {"name": recipe.name, "seed": recipe.seed}
    if recipe.imports:
        plain["import"] = [file.path for file in recipe.imports] if imports is None else list(imports)
    # an absent teacher is written as null, so that the resolved recipe names every section
    for section in ("teacher", "student", "data"):
        settings = getattr(recipe, section)
        plain[section] = None if settings is None else _plain(asdict(settings))
    plain["stages"] = [_plain_stage(entry) for entry in recipe.stages]
    plain["trainer"] = _plain(asdict(recipe.trainer))
    plain["logger"] = _plain(asdict(recipe.logger))
    return plain


def _plain_stage(entry: StageEntry) -> dict[str, Any]:
    # the label is not a field of the settings, and is written only where it was given
    name = {} if entry.label == entry.kind else {"name": entry.label}
    return {entry.kind: {**name, **_plain(asdict(entry.settings, dict_factory=_keyed))}}


def _keyed(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of a settings dataclass under the keys of recipes."""
    return {recipe_key(field): value for field, value in pairs}


def _plain(value: Any) -> Any:
    """Return the value with all tuples turned into lists."""
    # YAML has no tuples, and what is read back must equal what was written
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
