"""Checks before any work that the models' families support the recipe, and computes the share of weights that stages reach."""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING

from ...models.capabilities import Capabilities, coverage_refusal
from ...models.family_map import FAMILIES as MAPS
from ...models.family_map import no_map
from ...trainer.stage_plan import learns_from, trains
from .quantized_shapes import quantized_linears
from .shapes import ModelShape
from .stage_shapes import ImpossibleStageError, StageShape

if TYPE_CHECKING:
    from ...configs.recipe import Recipe, StageEntry
    from ...models.axis_map import Axis
    from ...trainer.settings import ExportSettings

_TABLE = "docs/families.md has the table of families"


def check_families(recipe: "Recipe", teacher: ModelShape | None, student: ModelShape) -> None:
    """Raise ImpossibleStageError with the family, the obstacle and the remedy if a stage cannot work on its model."""
    for entry in recipe.stages:
        # one is enough: a model of another family answers them all
        for reason in _reasons(recipe, entry, teacher, student):
            raise ImpossibleStageError(f"{entry.name}: {reason}")


def coverage(stage: StageShape) -> float | None:
    """Return the share of its input's decoder weights that a stage works on; None for stages that select no weights."""
    from ...trainer.settings import ExportSettings
    from ...trainer.settings_pruning import PruneSettings
    from ...trainer.settings_quantization import QatSettings, QuantizeSettings

    settings, weights = stage.entry.settings, stage.before.family.weights
    # single weights are chosen among all linears
    if isinstance(settings, PruneSettings):
        return cut_share(stage.before, settings.structured.axes) if settings.structured else weights.share()
    # an export packs what its scheme quantizes
    if isinstance(settings, QatSettings | QuantizeSettings | ExportSettings) and stage.scheme is not None:
        return weights.share(quantized_linears(stage.before, stage.scheme))
    return None


def cut_share(shape: ModelShape, kept: "Iterable[Axis]") -> float:
    """Return the share of the decoder's weights in matrices that structured pruning makes smaller or removes; 0.0 for an unknown family."""
    family = MAPS.get(shape.config.model_type)
    if family is None:
        return 0.0
    return family.cut_share({name: prod(sizes) for name, sizes in shape.tensors.items() if len(sizes) > 1}, kept)


def _reasons(recipe: "Recipe", entry: "StageEntry", teacher: ModelShape | None, student: ModelShape) -> Iterator[str]:
    from ...trainer.settings import ExportSettings
    from ...trainer.settings_pruning import PruneSettings
    from ...trainer.settings_quantization import QatSettings, QuantizeSettings

    settings, family = entry.settings, student.family
    models: list[tuple[str, Capabilities]] = [("the student", family)]
    if teacher is not None and learns_from(settings, has_teacher=True) == "recipe":
        models.append(("the teacher", teacher.family))
    for who, one in models:
        # a stage that does not train is measured all the same, by the report
        action = "distil" if trains(settings) else "measure"
        if reason := one.refusal(action):
            yield f"{who}, {reason}; use a model of another family ({_TABLE})"
        # only the teacher's weights may be in bf16; the student's master weights are always fp32
        if one is not family and recipe.teacher and recipe.teacher.load_in == "bf16" and (reason := one.refusal("bf16 teacher")):
            yield f"{who} in bf16, {reason}; set teacher.load_in: fp32"
        # all that runs text through the model meets packed windows, not training alone
        reads = action == "distil" or getattr(settings, "calibrates", False)
        if reads and recipe.data.packing and (reason := one.refusal("packing")):
            yield f"{who}, {reason}; set data.packing: false"
    if isinstance(settings, PruneSettings) and settings.structured:
        if reason := family.refusal("prune channels"):
            if student.config.model_type not in MAPS:
                # with the tensors of which a map would tell the axes
                reason = f"model type {student.config.model_type!r}: {no_map(student.config, student.tensors)}"
            # weights can be pruned without knowing where the FFN is, channels cannot
            other = "" if family.refusal("prune weights") else "prune.magnitude, or "
            yield f"{reason}; use {other}a model of one of these ({_TABLE})"
    elif isinstance(settings, PruneSettings | QatSettings | QuantizeSettings):
        yield from _of_weights(entry, student)
    elif isinstance(settings, ExportSettings):
        yield from _of_export(settings, student)


def _of_weights(entry: "StageEntry", student: ModelShape) -> Iterator[str]:
    """Yield the weights that the stage does not reach, and methods that are known to fail on the family."""
    from ...trainer.settings_pruning import PruneSettings
    from ...trainer.settings_quantization import QatSettings, QuantizeSettings

    settings, reached, named = entry.settings, list(student.linears), list[str]()
    if isinstance(settings, QatSettings | QuantizeSettings):
        named = [name for name in student.linears if any(fnmatchcase(name, pattern) for pattern in settings.skip)]
        reached = [name for name in student.linears if name not in named]
    # no linear at all is nothing to agree to
    agreed = settings.allow_partial and bool(student.linears)
    if not agreed and (reason := coverage_refusal(student.family.weights, reached, named)):
        allowed = f", or allow it by name: stages.{entry.index}.{entry.kind}.allow_partial=true" if student.linears else ""
        yield f"model type {student.family.model_type!r}: {reason}. Use a model of another family ({_TABLE}){allowed}"
    if isinstance(settings, PruneSettings):
        # a linear with a forward of its own can be pruned, and its inputs measured: what rounding fails on too is no obstacle here
        reason = student.family.partial("gptq") if settings.calibrates else None
        if reason and reason != student.family.partial("rtn"):
            yield f"{reason}; use prune.magnitude ({_TABLE})"
        return
    if named:
        # the families' known failures are of whole models; for a part of one the stage itself decides
        return
    calibrates = isinstance(settings, QuantizeSettings) and settings.calibrates
    starts = isinstance(settings, QatSettings) and settings.first == "gptq"
    asked = {"rtn": "", "gptq": "use start: mse" if starts else "use method rtn or mse", "qat": "use a stage 'quantize'"}
    # every quantizing stage rounds to nearest in the end, so that is always asked
    wanted = ["rtn", *(["gptq"] if calibrates or starts else []), *(["qat"] if isinstance(settings, QatSettings) else [])]
    for action in wanted:
        if reason := student.family.partial(action):
            yield f"{reason}; {asked[action]}".rstrip("; ") + f" ({_TABLE})"


def _of_export(settings: "ExportSettings", student: ModelShape) -> Iterator[str]:
    if reason := student.family.refusal("export"):
        yield f"{reason} ({_TABLE})"
