"""Opens the terms of a stage's loss on hidden states and attention relations: which layers meet, and whether they can be read."""

from pathlib import Path
from typing import Any

from ...losses.settings_features import FeatureSettings, HiddenSettings, RelationSettings
from ...models.common.errors import UserError
from ...models.common.terminal_text import counted
from ...models.families import decoder_layers
from ...models.folder.record import read_record
from ...models.layer_pairs import LayerPairs, layer_pairs, recorded_layers
from ...models.teachers import LocalTeacher, Teacher
from ..loop.features import Features, Wanted
from ..loop.metrics import read_row
from ..plan import TrainingPlan, derive_seed
from ..settings import TrainingBlock
from ..soft_targets.cached import SparseTeacher
from .context import StageContext, TrainingContext
from .student_and_teacher import OpenStudent


def open_features(
    settings: TrainingBlock, student: OpenStudent, context: TrainingContext, plan: TrainingPlan, teacher: Teacher | SparseTeacher | None
) -> Features | None:
    """Terms of the stage's loss besides that on predictions; None without any.

    Raises:
        UserError: the teacher's layers cannot be read, because a cache or a server predicts in its place, or for ``Features``' reasons.
    """
    asked = settings.loss.features
    if asked is None:
        return None
    # a recipe is refused before any work; this is for those who call the stage from Python
    if not isinstance(teacher, LocalTeacher):
        raise UserError(
            f"{context.name}: loss.features compare with the teacher's layers, which only a teacher in memory computes; remove "
            "teacher.cache and teacher.served, or loss.features"
        )
    if plan.compile:
        raise UserError(
            f"{context.name}: loss.features read what layers compute, and compiled layers (trainer.compile) do not show it; set it to false"
        )
    ours, theirs = len(decoder_layers(student.model)), len(decoder_layers(teacher.model))
    record = read_record(Path(context.input)) if isinstance(context, StageContext) and Path(context.input).is_dir() else {}
    kept = recorded_layers(record, ours, theirs)

    def pairs(part: HiddenSettings | RelationSettings | None, name: str) -> LayerPairs:
        key = f"{context.name}: loss.features.{name}.layers"
        return [] if part is None else layer_pairs(part.layers, ours, theirs, kept, key)

    wanted = Wanted(settings=asked, hidden=pairs(asked.hidden, "hidden"), relations=pairs(asked.relations, "relations"))
    # from the stage's own seed, as its order of windows
    features = Features(wanted, student.model, teacher, derive_seed(plan.seed, "projectors"))
    context.say(f"  {_words(asked, wanted, features)}")
    return features


def term_facts(metrics: Path | None, stage: str, asked: FeatureSettings | None) -> dict[str, Any] | None:
    """Mean of each term of a stage's loss over the last quarter of its steps, from its lines of ``metrics.jsonl``, with its weight.

    None without terms besides that on predictions, or without the file (on other ranks).
    """
    if asked is None or metrics is None or not metrics.is_file():
        return None
    read = (read_row(line) for line in metrics.read_text(encoding="utf-8", errors="replace").split("\n"))
    rows = [row for row in read if row is not None and row["stage"] == stage and row["step"]]
    weights = {"predictions": 1.0}
    weights |= {name: part.weight for name in ("hidden", "relations") if (part := getattr(asked, name)) is not None}
    found: dict[str, Any] = {}
    for name, weight in weights.items():
        known = [value for row in rows[-max(1, len(rows) // 4) :] if (value := row.get(f"loss_{name}")) is not None]
        if known:
            found[name] = {"weight": weight, "mean": sum(known) / len(known)}
    return found


def _words(asked: FeatureSettings, wanted: Wanted, features: Features) -> str:
    """The terms, for the output: 'and hidden states of 3 pairs of layers (student-teacher 0-1, 1-3, 2-5), cosine, weight 0.5'."""
    parts: list[str] = []
    if asked.hidden is not None:
        parts.append(f"hidden states of {_pairs(wanted.hidden)}, {asked.hidden.loss}, weight {asked.hidden.weight:g}")
    if asked.relations is not None:
        heads = counted(features.heads, "relation head")
        parts.append(f"relations {', '.join(asked.relations.of)} of {_pairs(wanted.relations)}, {heads}, weight {asked.relations.weight:g}")
    if features.projectors is not None:
        size: Any = next(iter(features.projectors.weights.values()))
        parts.append(
            f"{counted(len(features.projectors), 'projector')} {size.shape[0]} x {size.shape[1]}, which the stage drops at its end"
        )
    return f"and from {'; '.join(parts)}"


def _pairs(pairs: LayerPairs) -> str:
    return f"{counted(len(pairs), 'pair')} of layers (student-teacher {', '.join(f'{ours}-{theirs}' for ours, theirs in pairs)})"
