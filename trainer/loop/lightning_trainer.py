"""Lightning's Trainer for one stage, the loader that feeds it, and the switches around both."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.joined_windows import with_part
from ..data.order import StepBatches
from ..data.windows import WindowSource
from ..plan import TrainingPlan
from ..processes.strategy import lightning_strategy
from ..processes.world import World
from .metrics import MetricsSink
from .module import INDEX

_PRECISIONS = {"32": "32-true", "bf16-mixed": "bf16-mixed"}


class _Indexed(Dataset[dict[str, Tensor]]):
    """Windows with their own index, so that the error about a loss that is not finite can name them."""

    def __init__(self, windows: WindowSource) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**with_part(self._windows, index), INDEX: torch.tensor(index)}


def loader(windows: WindowSource, plan: TrainingPlan, world: World, start: int) -> DataLoader[dict[str, Tensor]]:
    """Loads this rank's micro-batches of the steps that are left, in order."""
    batches = StepBatches(
        windows,
        global_batch=plan.batch.global_windows,
        micro_batch=plan.batch.micro_batch,
        rank=world.rank,
        world=world.size,
        seed=plan.seed,
        start_step=start,
        total_steps=plan.total_steps,
    )
    # the loader draws a worker seed at each start: from the global generator that would change dropout after a resume
    own = torch.Generator().manual_seed(0)
    # pinned host memory lets copies to a GPU run beside its work
    return DataLoader(
        _Indexed(windows), batch_sampler=batches, num_workers=plan.num_workers, generator=own, pin_memory=torch.cuda.is_available()
    )


def lightning_trainer(plan: TrainingPlan, world: World, callbacks: list[pl.Callback], metrics: MetricsSink, work: Path) -> pl.Trainer:
    """A Lightning Trainer with its own checkpoints, progress bars, samplers and process launching switched off."""
    # Named, and not detected: inside a Slurm allocation Lightning would take a single process for one of Slurm's own tasks.
    environment = TorchElasticEnvironment() if "TORCHELASTIC_RUN_ID" in os.environ else LightningEnvironment()
    return pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=world.local_size,
        num_nodes=world.nodes,
        strategy=lightning_strategy(plan.strategy, world),
        plugins=[environment],
        precision=_PRECISIONS[plan.precision],  # pyright: ignore[reportArgumentType] - a dict's values are plain str
        # Lightning divides each micro-batch's loss by this number; the module multiplies gradients by it (law 1, docs/architecture.md)
        accumulate_grad_batches=plan.batch.accumulation,
        gradient_clip_val=plan.gradient_clip,
        # one pass over the loader, which has exactly the micro-batches that are left
        max_epochs=1,
        # for callbacks of the user's; decoct's own numbers go to the trackers directly
        logger=metrics.loggers or False,
        callbacks=callbacks,
        default_root_dir=work,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        # the batch sampler already gives each rank its own windows; Lightning would split them a second time
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silences Lightning's messages about devices, tips and features that are switched off on purpose; its errors stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    # restored afterwards: a program that uses decoct as a library may use Lightning itself
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            from lightning.fabric.utilities.warnings import PossibleUserWarning

            warnings.simplefilter("ignore", PossibleUserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Switches deterministic algorithms on during a stage; cuBLAS needs its workspace fixed before its first use."""
    # process-wide switches: evaluation and export after the stage must find them as they were
    before: Any = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
