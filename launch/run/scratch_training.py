"""Trains the embedded teacher before the first stage, on all ranks, under a lock: two runs may want the same one."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...models.common.locks import waiting_for
from ...models.folder.model_folder import save_model_folder
from ...trainer.scratch import LOCK, ScratchTeacher, check_scratch, new_llama, scratch_record, teacher_training
from ...trainer.stages.context import StageContext, Trained
from ...trainer.stages.student_and_teacher import OpenStudent
from ...trainer.stages.training import train_student, training_plan
from .run_folder import StageFolder
from .starting_point import RunInputs

if TYPE_CHECKING:
    from rich.console import Console

    from ...configs.recipe import Recipe
    from ...trainer.loop.metrics import MetricsSink
    from .session import Session

STAGE = "teacher"


def train_scratch_teacher(recipe: "Recipe", origin: RunInputs, session: "Session", metrics: "MetricsSink", console: "Console") -> None:
    """Make the teacher's model folder in the cache, unless an earlier run did."""
    assert recipe.teacher and recipe.teacher.scratch and origin.scratch
    settings, place = recipe.teacher.scratch, origin.scratch
    lock = contextlib.ExitStack()
    if session.on_first(lambda: _enter(lock, place.folder, console) or _is_made(place)):
        console.print(f"{STAGE} found in the cache", highlight=False)
        lock.close()
        return
    with lock:
        console.print(f"{STAGE} (trained once, then cached)", style="bold", highlight=False)
        student = new_llama(settings, origin.tokenizer, origin.v_eff, recipe.data.seq_length, recipe.seed)
        context = StageContext(
            name=STAGE,
            kind="pretrain",
            folder=place.folder,
            input="",
            input_revision=None,
            record={},
            teacher=None,
            data=origin.data,
            tokenizer=origin.tokenizer,
            v_eff=origin.v_eff,
            trainer=recipe.trainer,
            seed=recipe.seed,
            key=place.folder.name,
            metrics=metrics,
            console=console,
        )
        # a scratch teacher is small: nothing is gained by spreading it unless somebody asks for it
        opened = OpenStudent(student, None, "fsdp2" if recipe.trainer.strategy == "fsdp2" else "ddp")
        training = teacher_training(settings)
        trained = train_student(opened, training, context, training_plan(training, context, opened))
        session.on_first(lambda: _save(trained, recipe, origin))


def _is_made(place: ScratchTeacher) -> bool:
    if not place.model.is_dir():
        return False
    check_scratch(place, place.model)
    return True


def _enter(lock: contextlib.ExitStack, folder: Path, console: "Console") -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    lock.enter_context(waiting_for(folder / LOCK, "makes the same scratch teacher", say))


def _save(trained: Trained, recipe: "Recipe", origin: RunInputs) -> None:
    assert recipe.teacher and recipe.teacher.scratch and origin.scratch
    # bf16 is what teachers are published in; the rounded weights are the teacher from here on.
    training = {"tokens": trained.tokens, "seconds": trained.seconds}
    record = {**scratch_record(recipe.teacher.scratch, origin.data), "training": training}
    save_model_folder(origin.scratch.model, trained.student, origin.tokenizer, record, dtype=torch.bfloat16)
    StageFolder(origin.scratch.folder).drop_checkpoints(keep=0)
