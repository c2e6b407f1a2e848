"""The last Lightning callback of a stage, which writes its checkpoints."""

from typing import Any

import lightning.pytorch as pl

from .callback import LoopCallback
from .module import TrainingModule


class SavingCallback(pl.Callback):
    """The last of a stage's callbacks: saves when all others have seen a step, so that a checkpoint holds their state behind it."""

    def __init__(self, loop: LoopCallback) -> None:
        self._loop = loop

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Writes a checkpoint if one is due."""
        assert isinstance(pl_module, TrainingModule)
        self._loop.end_step(trainer, pl_module)
