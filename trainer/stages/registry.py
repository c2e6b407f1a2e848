"""The stage kinds: decoct's, and those that the recipe imports (``parts.stage``), which are known by their settings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..settings import DistillSettings, EvaluateSettings, ExportSettings, PretrainSettings
from ..settings_own import OwnStageSettings
from ..settings_pruning import PruneSettings
from ..settings_quantization import QatSettings, QuantizeSettings


@dataclass(frozen=True)
class StageKind:
    """One kind of stage."""

    settings: type
    """The dataclass of its settings."""
    format_version: int
    """Increased when the same settings give another result; part of the stage key."""
    load: Callable[[], "Work"]
    """Imports the stage module and returns its functions."""


@dataclass(frozen=True)
class Work:
    """Functions of a stage, in the order of calls. Each takes (settings, context); ``finish`` also takes the result of ``train``."""

    start: Callable[..., None] | None = None
    """Runs on rank 0 before all ranks train."""
    train: Callable[..., Any] | None = None
    """Runs on all ranks."""
    finish: Callable[..., Any] | None = None
    """Runs on rank 0 and writes the results of the stage. None = nothing is written, the model is only measured."""


# Imported inside functions: a recipe is checked without loading torch.
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


def _own() -> Work:
    from ..stages import own

    return Work(finish=own.finish)


STAGE_KINDS: dict[str, StageKind] = {
    "pretrain": StageKind(PretrainSettings, 1, _pretrain),
    "distill": StageKind(DistillSettings, 1, _distill),
    "prune": StageKind(PruneSettings, 2, _prune),
    "qat": StageKind(QatSettings, 2, _qat),
    "quantize": StageKind(QuantizeSettings, 1, _quantize),
    "export": StageKind(ExportSettings, 1, _export),
    # The run measures the model after every stage anyway; this kind only adds gates.
    "evaluate": StageKind(EvaluateSettings, 1, Work),
}
"""decoct's kinds by name."""


def stage_kind(kind: str, settings: Any) -> StageKind:
    """The kind of a stage with these settings."""
    return StageKind(type(settings), 1, _own) if isinstance(settings, OwnStageSettings) else STAGE_KINDS[kind]
