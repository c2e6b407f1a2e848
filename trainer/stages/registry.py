"""The stage kinds, closed: a recipe names one of these and nothing else is ever imported from a file."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..settings import (
    DistillSettings,
    EvaluateSettings,
    ExportSettings,
    PretrainSettings,
    PruneSettings,
    QatSettings,
    QuantizeSettings,
)


@dataclass(frozen=True)
class StageKind:
    """One kind of stage."""

    settings: type
    """The dataclass of its settings."""
    format_version: int
    """Raised when the same settings come to mean another result; part of the stage key."""
    load: Callable[[], tuple[Callable[..., Any] | None, Callable[..., Any] | None]]
    """Imports the stage and returns (train on all ranks, finish on rank 0); either may be None."""


def _pretrain() -> tuple[Any, Any]:
    from . import pretrain

    return pretrain.train, pretrain.finish


def _distill() -> tuple[Any, Any]:
    from . import distill

    return distill.train, distill.finish


def _prune() -> tuple[Any, Any]:
    from . import prune

    return prune.train, prune.finish


def _qat() -> tuple[Any, Any]:
    from . import qat

    return qat.train, qat.finish


def _quantize() -> tuple[Any, Any]:
    from . import quantize

    return None, quantize.finish


def _export() -> tuple[Any, Any]:
    from . import export

    return None, export.finish


STAGE_KINDS: dict[str, StageKind] = {
    "pretrain": StageKind(PretrainSettings, 1, _pretrain),
    "distill": StageKind(DistillSettings, 1, _distill),
    "prune": StageKind(PruneSettings, 1, _prune),
    "qat": StageKind(QatSettings, 1, _qat),
    "quantize": StageKind(QuantizeSettings, 1, _quantize),
    "export": StageKind(ExportSettings, 1, _export),
    # Its work is what the run does after every stage; the stage itself only names gates.
    "evaluate": StageKind(EvaluateSettings, 1, lambda: (None, None)),
}
