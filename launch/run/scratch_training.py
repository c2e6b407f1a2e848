"""Trains the scratch teacher before the first stage, on all ranks and under a lock, since two runs may need the same teacher."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...models.common.locks import waiting_for
from ...models.folder.model_folder import save_model_folder
from ...models.settings import ScratchSettings
from ...trainer.scratch import LOCK, ScratchTeacher, check_scratch, new_llama, scratch_record, teacher_training
from ...trainer.stages.context import RunContext, Trained, TrainingContext
from ...trainer.stages.student_and_teacher import OpenStudent
from ...trainer.stages.training import fit_student, training_plan
from .run_folder import StageFolder

if TYPE_CHECKING:
    from ...configs.recipe import Recipe
    from .session import Session

STAGE = "teacher"


def train_scratch_teacher(recipe: "Recipe", place: ScratchTeacher, run: RunContext, session: "Session") -> None:
    """Make the teacher's model folder in the cache, unless an earlier run did.

    Args:
        recipe: A recipe with a scratch teacher.
        place: The teacher's folder in the cache.
        run: The run's text, tokenizer and trainer.
        session: The session of this start of the run.
    """
    assert recipe.teacher is not None
    assert recipe.teacher.scratch is not None
    settings, console = recipe.teacher.scratch, run.console
    lock = contextlib.ExitStack()
    # under the lock: another run may have finished the same teacher while this one waited
    if session.on_first(lambda: _enter(lock, place.folder, run) or _is_made(place)):
        console.print(f"{STAGE} found in the cache", highlight=False)
        lock.close()
        return
    with lock:
        console.print(f"{STAGE} (trained once, then cached)", style="bold", highlight=False)
        model = new_llama(settings, run.tokenizer, run.v_eff, recipe.data.seq_length, recipe.seed)
        # a scratch teacher is small: nothing is gained by spreading it unless somebody asks for it
        student = OpenStudent(model, None, "fsdp2" if recipe.trainer.strategy == "fsdp2" else "ddp")
        # the folder's name is the hash of all that decides the teacher, which makes it the key of its checkpoints
        context = TrainingContext(run=run, name=STAGE, kind="pretrain", folder=place.folder, key=place.folder.name)
        training = teacher_training(settings)
        trained = fit_student(student, training, context, training_plan(training, context, student), None)
        session.on_first(lambda: _save(trained, settings, place, run))


def _is_made(place: ScratchTeacher) -> bool:
    if not place.model.is_dir():
        return False
    check_scratch(place, place.model)
    return True


def _enter(lock: contextlib.ExitStack, folder: Path, run: RunContext) -> None:
    lock.enter_context(waiting_for(folder / LOCK, "makes the same scratch teacher", run.say))


def _save(trained: Trained, settings: ScratchSettings, place: ScratchTeacher, run: RunContext) -> None:
    # bf16 is what teachers are published in; the rounded weights are the teacher from here on.
    training = {"tokens": trained.tokens, "seconds": trained.seconds}
    record = {**scratch_record(settings, run.data), "training": training}
    save_model_folder(place.model, trained.student, run.tokenizer, record, dtype=torch.bfloat16)
    # only after the model has its name: until then the checkpoints are the way back to it
    StageFolder(place.folder).drop_checkpoints(keep=0)
