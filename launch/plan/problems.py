"""Finds what cannot work in a plan."""

import os
import shutil
from pathlib import Path

from .fitting import usable
from .plan_types import Machine, Plan, Training
from .rounding import RoundingPlan
from .units import size


def problems(plan: Plan, out: Path | None = None) -> list[str]:
    """Return what cannot work, one sentence each with the remedy; [] if no problem is known."""
    found = [
        f"{stage.name} {_too_large(stage.training, plan.machine)}"
        for stage in plan.stages
        # False, not None: memory that is not known refuses nothing
        if stage.training and stage.training.fits is False
    ]
    found += [f"{stage.name}: {refusal}" for stage in plan.stages for refusal in stage.refusals]
    found += [
        f"{stage.name} {_too_wide(stage.rounding, plan.machine, f'stages.{stage.name}', starts=stage.training is not None)}"
        for stage in plan.stages
        if stage.rounding and stage.rounding.fits is False
    ]
    if out is not None:
        # the run folder may not exist yet: its nearest existing parent is on the same disk
        place = next(p for p in (out.absolute(), *out.absolute().parents) if os.path.exists(p))
        free = shutil.disk_usage(place).free
        if free < plan.disk_bytes:
            found.append(
                f"the run writes up to {size(plan.disk_bytes)}, and {place} has {size(free)} free; "
                "free some space or choose another folder with --out"
            )
    return found


def _too_large(training: Training, machine: Machine) -> str:
    assert machine.gpu_memory is not None
    need, room = training.memory.total / 1e9, usable(machine.gpu_memory) / 1e9
    what = f"needs {need:,.1f} GB on each GPU, and {room:,.1f} GB can be used"
    if training.remedy is None:
        return f"{what}; no setting makes it fit: take larger GPUs or a smaller model"
    return f"{what}; the cheapest way: {' '.join(training.remedy.settings)} ({training.remedy.roles.total / 1e9:,.1f} GB)"


def _too_wide(rounding: RoundingPlan, machine: Machine, stage: str, *, starts: bool) -> str:
    assert machine.gpu_memory is not None
    need, room = rounding.device_bytes / 1e9, usable(machine.gpu_memory) / 1e9
    what = f"works on one layer at a time, which takes {need:,.1f} GB on a GPU, and {room:,.1f} GB can be used"
    if starts:
        return f"rounds the model before it trains and {what}; take a larger GPU, or {stage}.start=mse"
    return f"{what}; take a larger GPU, or have it done on a CPU, which takes longer (CUDA_VISIBLE_DEVICES='')"
