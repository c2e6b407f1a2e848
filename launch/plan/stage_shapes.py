"""The shape of every model that a recipe passes through: teacher, student, and what each stage makes of it."""

import copy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ...models.common.errors import UserError
from ...qat.bit_assignment import BudgetError
from ...qat.scheme import example_of
from ...qat.super_blocks import no_zero
from ...trainer.settings_own import OwnStageSettings
from .quantized_shapes import quantized_linears
from .shape_budgets import shape_space
from .shapes import ModelShape, config_from, config_of, shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...configs.recipe import Recipe, StageEntry
    from ...models.axis_map import Axis
    from ...qat.scheme import QuantScheme
    from ...qat.spec import ActivationSpec
    from ...qat.transforms.settings import TransformSettings
    from ...trainer.settings_pruning import PruneSettings
    from ...trainer.settings_structured import StructuredSettings


@dataclass(frozen=True)
class StageShape:
    """Shapes of a stage's input and output."""

    entry: "StageEntry"
    """Where the stage will choose widths (``weights.bits: auto``), with widths that stand in for its choice (``bit_budget``)."""
    before: ModelShape
    after: ModelShape
    scheme: "QuantScheme | None"
    """Quantization scheme of the weights after the stage; None if they are not quantized."""
    activations: "ActivationSpec | None" = None
    """How the inputs of the quantized linears are rounded after the stage."""
    kv_cache: "ActivationSpec | None" = None
    """How keys and values are rounded after the stage."""
    continues: bool = False
    """A stage qat that starts from the codes of the stage before it."""
    asked: Any = None
    """The settings as the recipe has them, where ``entry`` has others."""
    note: str = ""
    """What the plan says of the choice of widths; '' without one."""


class ImpossibleStageError(UserError):
    """A stage asks for something that no model of its shape has; raised before anything runs."""


def teacher_shape(recipe: "Recipe") -> ModelShape | None:
    """Return the shape of the recipe's teacher; for a scratch teacher with the requested vocabulary."""
    if recipe.teacher is None:
        return None
    if scratch := recipe.teacher.scratch:
        from ...trainer.scratch_fields import scratch_fields

        fields = scratch_fields(scratch, scratch.vocab, recipe.data.seq_length)
        return shape_of(config_from({"model_type": "llama", **fields}), "teacher.scratch")
    assert recipe.teacher.path is not None
    return shape_of(*config_of(recipe.teacher.path, recipe.teacher.revision))


def student_shape(recipe: "Recipe", teacher: ModelShape | None) -> ModelShape:
    """Return the student's shape before the first stage; its vocabulary is the teacher's until the tokenizer is read.

    Raises:
        ImpossibleStageError: ``student.keep`` or ``student.config`` asks for a model that cannot be made.
        UserError: the config at ``student.path`` cannot be found.
    """
    from ...models.kept_layers import kept_config

    settings = recipe.student
    if settings.path:
        return shape_of(*config_of(settings.path, settings.revision))
    if settings.keep:
        if teacher is None:
            raise ImpossibleStageError("student.keep needs a teacher to cut the student from; add one, or use student.path")
        if reason := teacher.family.refusal("keep layers"):
            raise ImpossibleStageError(f"student.keep: {reason}; use student.path or student.config (docs/families.md)")
        try:
            config, _ = kept_config(teacher.config, settings.keep.layers)
        except UserError as error:
            raise ImpossibleStageError(str(error)) from error
        return shape_of(config, f"{settings.keep.depth} of the teacher's {teacher.layers} layers")
    fields = dict(settings.config or {})
    if teacher is not None:
        # the tokenizer decides the vocabulary; before it is read, the teacher's is the best guess
        fields.setdefault("vocab_size", teacher.vocabulary)
    try:
        config = config_from(fields)
    except UserError as error:
        raise ImpossibleStageError(str(error)) from error
    return shape_of(config, "student.config")


def stage_shapes(recipe: "Recipe", student: ModelShape) -> list[StageShape]:
    """Return the shapes of every stage, in order."""
    from ...trainer.settings_pruning import PruneSettings
    from ...trainer.settings_quantization import QatSettings, QuantizeSettings

    found: list[StageShape] = []
    # what the stage before has left: the shape, the scheme of its codes, and whether weights were pruned
    shape, scheme, beside, sparse = student, None, {}, False
    for entry in recipe.stages:
        before, continues, note = shape, False, ""
        asked = settings = entry.settings
        if isinstance(settings, PruneSettings) and settings.structured:
            shape = _pruned(shape, settings.structured, entry.name)
        elif isinstance(settings, PruneSettings):
            _check_weights(shape, settings, entry, recipe.data.seq_length)
        if isinstance(settings, QatSettings | QuantizeSettings):
            settings, note = _with_widths(settings, shape, entry)
            entry = replace(entry, settings=settings)
            # the codes of the stage before fit: the same scheme, no pruned weights, and no rounding of inputs or cache beside it
            same = settings.scheme == scheme and not sparse and not any(beside.values())
            scheme = settings.scheme
            beside = {"activations": settings.activations, "kv_cache": settings.kv_cache}
            _check_scheme(shape, scheme, entry)
            if isinstance(settings, QuantizeSettings) and settings.importance is not None:
                _check_importance(shape, settings.importance, entry)
            if sparse:
                _check_zeros_held(shape, scheme, entry)
            if isinstance(settings, QuantizeSettings) and settings.transform is not None:
                shape = _transformed(recipe, shape, settings.transform, entry, sparse)
            continues = same and isinstance(settings, QatSettings) and settings.first == "gptq" and not any(beside.values())
            if not continues:
                _check_calibration(shape, scheme, entry, recipe.data.seq_length)
        elif entry.kind in ("pretrain", "distill", "prune") or makes_own_model(settings):
            # training and pruning write plain weights: an earlier quantization is gone
            scheme, beside = None, {}
            sparse = sparse or (isinstance(settings, PruneSettings) and settings.weights is not None)
        found.append(StageShape(entry, before, shape, scheme, **beside, continues=continues, asked=asked if note else None, note=note))
    return found


def _transformed(
    recipe: "Recipe", shape: ModelShape, transform: "TransformSettings", entry: "StageEntry", sparse: bool
) -> ModelShape:  # fmt: skip
    """Return the shape after a transform: a rotation unties the head. Raise ImpossibleStageError if the model cannot be transformed."""
    from ...models.folder.hub import local_folder
    from ...models.folder.record import read_record
    from ...qat.transforms.limits import transform_refusal, unties

    path = recipe.student.path
    # a folder that is here may have a mask of its own; what earlier stages prune is known from their settings
    if path and not sparse and (folder := local_folder(path, revision=recipe.student.revision)) is not None and folder.is_dir():
        sparse = bool(read_record(folder).get("sparse"))
    if reason := transform_refusal(transform, shape.config, sparse=sparse, tensors=shape.tensors):
        raise ImpossibleStageError(f"stages.{entry.index}.{entry.kind}.transform: {transform.method}: {reason}")
    if not unties(transform, shape.config):
        return shape
    config = copy.deepcopy(shape.config)
    config.tie_word_embeddings = False
    return shape_of(config, f"{shape.source}, with a head of its own")


def _with_widths(settings: Any, shape: ModelShape, entry: "StageEntry") -> tuple[Any, str]:
    """Return the settings with a width for every module, and a note if the stage will choose them."""
    from .bit_budget import stand_in

    try:
        return stand_in(settings, shape)
    except BudgetError as error:
        raise ImpossibleStageError(f"stages.{entry.index}.{entry.kind}.weights.{error}") from error
    except ValueError as error:
        raise ImpossibleStageError(f"stages.{entry.index}.{entry.kind}.{error}") from error


def makes_own_model(settings: object) -> bool:
    """Return whether an imported stage writes a model. What it makes of the shape is not known; the plan takes the shape as unchanged."""
    return isinstance(settings, OwnStageSettings) and settings.part.makes_model


def _check_weights(shape: ModelShape, settings: "PruneSettings", entry: "StageEntry", seq_length: int) -> None:
    """Raise ImpossibleStageError if a pattern does not divide the inputs of a linear, or SparseGPT gets too few tokens."""
    assert settings.weights is not None
    place = f"stages.{entry.index}.{entry.kind}"
    widths = {name: columns for name, (_, columns) in shape.linears.items()}
    if settings.weights.nm is not None:
        try:
            settings.weights.nm.check_widths(widths)
        except UserError as error:
            raise ImpossibleStageError(f"{place}.{settings.method}.{error}") from error
    if settings.sparsegpt:
        _check_tokens(settings.calibration_tokens, max(widths.values(), default=0), seq_length, place, "SparseGPT")


def _check_calibration(shape: ModelShape, scheme: "QuantScheme", entry: "StageEntry", seq_length: int) -> None:
    """Raise ImpossibleStageError if GPTQ gets fewer tokens, in whole windows, than the widest matrix has inputs."""
    # a qat stage takes calibration tokens only where it starts by GPTQ (``QatSettings``), so it needs no key for the method
    given, method = entry.settings.calibration_tokens, getattr(entry.settings, "method", "gptq")
    if given is None or method != "gptq":
        return
    # a Hessian of n inputs has full rank only with at least n tokens
    widest = max((one.columns for name, one in quantized_linears(shape, scheme).items() if name in shape.linears), default=0)
    _check_tokens(given, widest, seq_length, f"stages.{entry.index}.{entry.kind}", "GPTQ")


def _check_tokens(given: int | None, widest: int, seq_length: int, place: str, method: str) -> None:
    """Raise ImpossibleStageError if the calibration tokens, in whole windows, are fewer than the widest matrix has inputs."""
    # calibration reads whole windows
    tokens = -(-(given or 0) // seq_length) * seq_length
    if tokens < widest:
        raise ImpossibleStageError(
            f"{place}.calibration_tokens: {tokens:,} tokens are too few for a matrix with {widest:,} inputs; "
            f"{method} needs at least as many, and many times that are usual"
        )


def _check_importance(shape: ModelShape, path: str, entry: "StageEntry") -> None:
    """Raise ImpossibleStageError if the file is no importance matrix of this model."""
    from ...qat.importance import importance_of

    try:
        importance_of(path, shape.config.model_type, {name: columns for name, (_, columns) in shape.linears.items()})
    except UserError as error:
        raise ImpossibleStageError(f"stages.{entry.index}.{entry.kind}.importance: {error}") from error


def _check_zeros_held(shape: ModelShape, scheme: "QuantScheme", entry: "StageEntry") -> None:
    """Raise ImpossibleStageError if pruned linears have a kind that does not hold 0."""
    kinds = {one.spec.kind for name, one in quantized_linears(shape, scheme).items() if name in shape.linears and not one.spec.holds_zero}
    if kinds:
        raise ImpossibleStageError(f"stages.{entry.index}.{entry.kind}.weights: {no_zero(min(kinds))}")


def _check_scheme(shape: ModelShape, scheme: "QuantScheme", entry: "StageEntry") -> None:
    """Raise ImpossibleStageError if a pattern matches nothing, or a group size does not divide; names the widths that would."""
    place = f"stages.{entry.index}.{entry.kind}"
    try:
        quantized = quantized_linears(shape, scheme)
    except ValueError as error:
        # the message begins with the key that is wrong
        raise ImpossibleStageError(f"{place}.{error}") from error
    leaves = [*shape.linears, shape.embedding, shape.head]
    for pattern in scheme.skip:
        if not any(fnmatchcase(name, pattern) for name in leaves):
            raise ImpossibleStageError(f"{place}.skip: {pattern!r} matches no linear layer of the model; {example_of(shape.linears)}")
    if not quantized:
        raise ImpossibleStageError(f"{place}: there is nothing to quantize: skip={list(scheme.skip)} leaves no linear layer")
    if scheme.head and not shape.head:
        raise ImpossibleStageError(
            f"{place}.head: the head is tied to the embedding, whose table it multiplies by; use 'embedding', which then applies to both"
        )
    for name, (_, columns, spec) in quantized.items():
        # the spec's own rule, asked for each matrix
        try:
            spec.group_width(columns)
        except ValueError as error:
            raise ImpossibleStageError(f"{place}.weights.group_size: module {name}: {error}") from error


def _pruned(shape: ModelShape, structured: "StructuredSettings", stage: str) -> ModelShape:
    """Return the shape that structured pruning leaves."""
    from ...models.family_map import family_of
    from ...models.kept_layers import cut_config, kept_layers
    from ...models.sizes import WORDS, sizes_of, target_sizes

    family = family_of(shape.config)
    before = sizes_of(shape.config, family)
    about = ""
    try:
        kept = structured.kept
        if (space := shape_space(shape, structured)) is not None:
            # which shape it will be, scores decide; all of them cost about the same
            kept, about = space.most_even().kept(before), "such as "
        after = target_sizes(shape.config, family, kept)
    except UserError as error:
        raise ImpossibleStageError(f"{stage}: {error}") from error
    # which layers stay is decided by scores; their sizes are alike
    config = cut_config(shape.config, family, after, kept_layers(before.layers, after.layers))
    told = ", ".join(f"{after.of(axis):,} of {before.of(axis):,} {WORDS[axis]}" for axis in kept)
    return shape_of(config, f"{shape.source}, {about}{told}")


def broken_pattern(recipe: "Recipe", entry: "StageEntry", kept: "Mapping[Axis, int]") -> list[str]:
    """Return a note if the cut ends an N:M pattern of an earlier stage: it removes some inputs of a row, so that others form the groups."""
    from ...trainer.settings_pruning import PruneSettings

    # whole layers take their rows with them
    if not set(kept) - {"layers"}:
        return []
    told = []
    for other in recipe.stages[: entry.index]:
        weights = other.settings.weights if isinstance(other.settings, PruneSettings) else None
        if weights is not None and weights.pattern is not None:
            what = f"the {weights.pattern} pattern of stages.{other.index}"
            told.append(f"{what} does not hold after this cut, which regroups the inputs of rows; cut first, then set weights to zero")
    return told


def shape_notes(shape: ModelShape, kept: "Mapping[Axis, int]") -> list[str]:
    """Return what serving kernels and vLLM will say to the shape that structured pruning leaves, one sentence each."""
    from ...models.family_map import family_of
    from ...models.shape_advice import alignment_advice, server_advice
    from ...models.sizes import sizes_of

    family = family_of(shape.config)
    sizes = sizes_of(shape.config, family)
    return [*alignment_advice(sizes, kept), *server_advice(family, sizes)]
