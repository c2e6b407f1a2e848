"""Opens the student and the teacher of a training stage. A sharded student is opened empty and filled by each rank."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...models.batches import check_packing
from ...models.causality import check_causal
from ...models.families import check_head
from ...models.folder.loading import load_config, load_model, meta_model
from ...models.folder.streaming import can_stream, empty_model
from ...models.folder.weights import WeightFiles
from ...models.teachers import LocalTeacher, Teacher, TeacherRef, open_teacher
from ..plan import StepPlan
from ..processes.strategy import choose_strategy, device_bytes, shards
from ..processes.teacher_memory import teacher_bytes, teacher_size
from ..processes.world import current_world, value_of_first
from ..settings import ChosenStrategy, TrainingBlock
from ..soft_targets.cached import SparseTeacher
from ..soft_targets.fill import CacheRequest, cached_teacher
from ..soft_targets.served import ServedTeacher
from ..stage_plan import held_teacher, learns_from, wanted_strategy
from .context import RunContext, StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class OpenStudent:
    """The input model of a stage, ready for ``fit``."""

    model: "PreTrainedModel"
    """fp32 master weights; on the meta device when ``weights`` is given."""
    weights: WeightFiles | None
    """Files from which each rank reads its own rows; None when the model is loaded whole."""
    strategy: ChosenStrategy
    """How the student is distributed over ranks."""


def open_student(settings: TrainingBlock, context: StageContext) -> OpenStudent:
    """Open the stage's input with fp32 master weights. Under FSDP2 each rank reads and holds only its share, if the files allow it."""
    strategy = stage_strategy(settings, context)
    place, revision = context.input, context.input_revision
    if shards(strategy, current_world()) and can_stream(place, revision):
        # meta device: the whole model never exists on one rank
        model, weights = empty_model(place, revision)
        return OpenStudent(model, weights, strategy)
    # fp32 whatever the folder holds: these are the master weights that the optimizer moves
    model = load_model(place, dtype=torch.float32, revision=revision)
    # by running the model: an empty one on the meta device cannot be tried
    check_head(model)
    check_causal(model, f"{context.name}: the student")
    if context.run.data.packed:
        check_packing(model, f"{context.name}: the student")
    return OpenStudent(model, None, strategy)


def whole_student(context: StageContext) -> "PreTrainedModel":
    """Load the stage's input in fp32 for work on rank 0 alone, on its GPU if there is one."""
    return load_model(context.input, dtype=torch.float32, revision=context.input_revision, device=current_device())


def current_device() -> torch.device:
    """This rank's GPU, or the CPU."""
    return torch.device("cuda", current_world().local_rank) if torch.cuda.is_available() else torch.device("cpu")


def stage_strategy(settings: TrainingBlock, context: StageContext) -> ChosenStrategy:
    """Strategy of this stage: as the recipe sets it, or chosen by memory on rank 0 and the same on every rank."""
    wanted = wanted_strategy(settings, context.run.trainer, name=context.name)
    world, memory = current_world(), device_bytes()
    if wanted != "auto":
        return wanted
    # without GPUs there is no memory limit to decide by
    if world.size == 1 or memory is None:
        return "ddp"
    chosen = choose_strategy(
        "auto",
        ranks=world.size,
        parameters=stored_parameters(context.input, context.input_revision),
        optimizer=context.run.trainer.optimizer,
        teacher_bytes=stage_teacher_bytes(settings, context, world.size),
        device_bytes=memory,
    )
    # free memory differs between ranks, and a strategy must not: rank 0 decides
    return "fsdp2" if value_of_first(int(chosen == "fsdp2")) else "ddp"


def stage_teacher_bytes(settings: TrainingBlock, context: StageContext, ranks: int) -> int:
    """Bytes of the stage's teacher on each device, derived from its config; 0 when no teacher is held."""
    held = held_teacher(settings, context.run.teacher, name=context.name)
    if held is None:
        return 0
    path, revision = context.input, context.input_revision
    # otherwise the stage's own input is its teacher, a second copy beside the student
    if held.whose == "recipe" and context.run.teacher is not None:
        path, revision = context.run.teacher.path, context.run.teacher.revision
    return teacher_bytes(teacher_size(meta_model(load_config(path, revision=revision))), held.load_in, held.placement, ranks)


def stored_parameters(path: str, revision: str | None) -> int:
    """Number of parameters of a model folder or hub id, derived from its config; tied weights count once."""
    return sum(parameter.numel() for parameter in meta_model(load_config(path, revision=revision)).parameters())


def stage_teacher(settings: TrainingBlock, context: StageContext, steps: StepPlan) -> Teacher | SparseTeacher | None:
    """Teacher of the stage, on this rank's device, in its cache or behind a server; None when the loss needs none."""
    held = held_teacher(settings, context.run.teacher, name=context.name)
    # before the check of `held`: a served teacher holds no weights here but still predicts
    if learns_from(settings, has_teacher=context.run.teacher is not None) == "recipe":
        return recipe_teacher(settings, context.run, context.name, steps)
    if held is None:
        return None
    teacher = open_teacher(
        context.input,
        load_in=held.load_in,
        placement=held.placement,
        device=current_device(),
        revision=context.input_revision,
        v_eff=context.run.v_eff,
        name="its own input",
    )
    return _checked(teacher, context.run, context.name)


def recipe_teacher(settings: TrainingBlock, run: RunContext, stage: str, steps: StepPlan) -> Teacher | SparseTeacher:
    """Open the teacher of the recipe: in memory, from its cache, or behind a server (all ranks call this).

    Args:
        settings: Settings of the stage.
        run: Run context; its teacher must not be None.
        stage: Name of the stage, for messages.
        steps: Plan that determines which windows the stage sees.
    """
    teacher = run.teacher
    assert teacher is not None
    if teacher.cache is None:
        return _running_teacher(teacher, run, stage)
    wanted = CacheRequest(
        stage=stage,
        teacher=teacher,
        cache=teacher.cache,
        windows=run.data.train,
        tokenizer=run.tokenizer,
        v_eff=run.v_eff,
        console=run.console,
        # opened only when the cache lacks windows, which saves loading a large model
        open_teacher=lambda: _running_teacher(teacher, run, stage),
    )
    return cached_teacher(wanted, settings.loss, steps)


def _running_teacher(teacher: TeacherRef, run: RunContext, stage: str) -> LocalTeacher | ServedTeacher:
    if teacher.served:
        return ServedTeacher(teacher.served, run.v_eff)
    return _checked(teacher.open(device=current_device(), v_eff=run.v_eff), run, stage)


def _checked(teacher: LocalTeacher, run: RunContext, stage: str) -> LocalTeacher:
    if run.data.packed:
        check_packing(teacher.model, f"{stage}: the teacher")
    return teacher
