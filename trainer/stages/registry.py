"""The stage kinds, closed: a recipe names one of these and nothing else is ever imported from a file."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..settings import DistillSettings, EvaluateSettings, ExportSettings, PretrainSettings, PruneSettings
from ..settings_quantization import QatSettings, QuantizeSettings


@dataclass(frozen=True)
class StageKind:
    """One kind of stage."""

    settings: type
    """The dataclass of its settings."""
    format_version: int
    """Raised when the same settings come to mean another result; part of the stage key."""
    load: Callable[[], "Work"]
    """Imports the stage."""


@dataclass(frozen=True)
class Work:
    """What a stage does, in order; each takes (settings, context), the last also what ``train`` gave."""

    start: Callable[..., None] | None = None
    """On rank 0, before all train."""
    train: Callable[..., Any] | None = None
    """On all ranks."""
    finish: Callable[..., Any] | None = None
    """On rank 0: writes what the stage makes; None = the stage is only measured."""


def _pretrain() -> Work:
    from ..stages import pretrain

    return Work(train=pretrain.train, finish=pretrain.finish)


def _distill() -> Work:
    from ..stages import distill

    return Work(train=distill.train, finish=distill.finish)


def _prune() -> Work:
    from ..stages import prune

    return Work(train=prune.train, finish=prune.finish)


def _qat() -> Work:
    from ..stages import qat

    return Work(start=qat.start, train=qat.train, finish=qat.finish)


def _quantize() -> Work:
    from ..stages import quantize

    return Work(finish=quantize.finish)


def _export() -> Work:
    from ..stages import export

    return Work(finish=export.finish)


STAGE_KINDS: dict[str, StageKind] = {
    "pretrain": StageKind(PretrainSettings, 1, _pretrain),
    "distill": StageKind(DistillSettings, 1, _distill),
    "prune": StageKind(PruneSettings, 2, _prune),
    "qat": StageKind(QatSettings, 2, _qat),
    "quantize": StageKind(QuantizeSettings, 1, _quantize),
    "export": StageKind(ExportSettings, 1, _export),
    # Its work is what the run does after every stage; the stage itself only names gates.
    "evaluate": StageKind(EvaluateSettings, 1, Work),
}
