"""What a training stage starts from: the student, whole or as empty shapes to be filled by each rank, and the teacher."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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
from ..settings import TrainingBlock
from ..soft_targets.cached import SparseTeacher
from ..soft_targets.fill import CacheRequest, cached_teacher
from ..soft_targets.served import ServedTeacher
from ..stage_plan import held_teacher, learns_from, wanted_strategy
from .context import RunContext, StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class OpenStudent:
    """A stage's input, ready for ``fit``."""

    model: "PreTrainedModel"
    """fp32 master weights; on the meta device when ``weights`` is given."""
    weights: WeightFiles | None
    """Where each rank reads its own rows from."""
    strategy: Literal["ddp", "fsdp2"]
    """How the student is spread over ranks."""


def open_student(settings: TrainingBlock, context: StageContext) -> OpenStudent:
    """The stage's input with fp32 master weights. Under FSDP2 no rank ever reads, or holds, more of it than its share."""
    strategy = stage_strategy(settings, context)
    place, revision = context.input, context.input_revision
    if shards(strategy, current_world()) and can_stream(place, revision):
        model, weights = empty_model(place, revision)
        return OpenStudent(model, weights, strategy)
    model = load_model(place, dtype=torch.float32, revision=revision)
    check_head(model)
    check_causal(model, f"{context.name}: the student")
    if context.run.data.packed:
        check_packing(model, f"{context.name}: the student")
    return OpenStudent(model, None, strategy)


def whole_student(context: StageContext) -> "PreTrainedModel":
    """The stage's input in fp32, for work that rank 0 does alone, on its GPU where there is one."""
    return load_model(context.input, dtype=torch.float32, revision=context.input_revision, device=current_device())


def current_device() -> torch.device:
    """This rank's GPU, or the CPU."""
    return torch.device("cuda", current_world().local_rank) if torch.cuda.is_available() else torch.device("cpu")


def stage_strategy(settings: TrainingBlock, context: StageContext) -> Literal["ddp", "fsdp2"]:
    """How this stage's student is spread: the recipe's word, or by what fits (decided on rank 0, the same on every rank)."""
    wanted = wanted_strategy(settings, context.run.trainer, name=context.name)
    world, memory = current_world(), device_bytes()
    if wanted != "auto":
        return wanted
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
    return "fsdp2" if value_of_first(int(chosen == "fsdp2")) else "ddp"


def stage_teacher_bytes(settings: TrainingBlock, context: StageContext, ranks: int) -> int:
    """Bytes of the stage's teacher on each device, by its config; 0 where none is held."""
    held = held_teacher(settings, context.run.teacher, name=context.name)
    if held is None:
        return 0
    path, revision = context.input, context.input_revision
    if held.whose == "recipe" and context.run.teacher is not None:
        path, revision = context.run.teacher.path, context.run.teacher.revision
    return teacher_bytes(teacher_size(meta_model(load_config(path, revision=revision))), held.load_in, held.placement, ranks)


def stored_parameters(path: str, revision: str | None) -> int:
    """Parameters of a model folder or hub id, by its config; tied ones once."""
    return sum(parameter.numel() for parameter in meta_model(load_config(path, revision=revision)).parameters())


def stage_teacher(settings: TrainingBlock, context: StageContext, steps: StepPlan) -> Teacher | SparseTeacher | None:
    """The teacher that the stage learns from, on this rank's device or in its cache; None when its loss needs none."""
    held = held_teacher(settings, context.run.teacher, name=context.name)
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
    """The recipe's teacher as a stage learns from it: running here, read from its cache, or behind a server (all ranks).

    Args:
        settings: Of the stage.
        run: Has a teacher.
        stage: Name of the stage, for messages.
        steps: Say which windows the stage will see.
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
