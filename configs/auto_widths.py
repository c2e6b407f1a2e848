"""The widths that ``weights.bits: auto`` chooses among: those that every export of the stage can hold."""

from collections.abc import Sequence
from dataclasses import replace

from ..qat.auto_weights import LEFT_ALONE, WIDTHS, WeightSettings
from ..trainer.settings import ExportSettings
from ..trainer.settings_quantization import QatSettings, QuantizeSettings
from .draft import key_path
from .problems import Problems
from .recipe import StageEntry

_WRITERS = ("pretrain", "distill", "prune", "qat", "quantize")


def exportable_widths(stages: Sequence[StageEntry | None], problems: Problems) -> list[StageEntry | None]:
    """Return the stages with ``weights.widths`` filled in where widths are chosen for an export; report given widths that it refuses."""
    return [_narrowed(entry, _exports_of(entry, stages), problems) if entry is not None else None for entry in stages]


def _exports_of(entry: StageEntry, stages: Sequence[StageEntry | None]) -> list[ExportSettings]:
    """Return the exports that read what a stage writes."""
    found = []
    for other in stages[entry.index + 1 :]:
        if other is not None and other.kind in _WRITERS:
            break
        if other is not None and isinstance(other.settings, ExportSettings):
            found.append(other.settings)
    return found


def _narrowed(entry: StageEntry, exports: Sequence[ExportSettings], problems: Problems) -> StageEntry:
    settings = entry.settings
    if not isinstance(settings, QatSettings | QuantizeSettings) or settings.auto is None:
        return entry
    auto: WeightSettings = settings.auto
    asked = auto.given_widths
    reasons = {width: reason for width in asked if width != LEFT_ALONE and (reason := _refused(width, settings, exports))}
    kept = tuple(width for width in asked if width not in reasons)
    if not reasons:
        return entry
    where = key_path(entry, "weights", "widths" if auto.widths else "bits")
    said = "; ".join(f"{width} bits: {reason}" for width, reason in reasons.items())
    if len(kept) < 2:
        problems.add(where, f"leaves fewer than two widths to choose from: {said}; export another format, or give bits a number")
    elif auto.widths is not None:
        problems.add(where, f"has widths that the export cannot hold or gains nothing from: {said}; use [{', '.join(map(str, kept))}]")
    else:
        try:
            return replace(entry, settings=replace(settings, weights=replace(auto, widths=kept)))
        except ValueError as error:
            problems.add(key_path(entry, "weights", "budget"), f"{error} (of {list(WIDTHS)}, {said})")
    return entry


def _refused(width: int, settings: QatSettings | QuantizeSettings, exports: Sequence[ExportSettings]) -> str | None:
    """Return why an export does not take a width, the end of a sentence; None if all take it."""
    # only where widths are chosen: these read numpy
    from ..qat.export.limits.widths import as_small_as, refused_width

    auto = settings.auto
    assert auto is not None
    spec = auto.with_bits(width)
    others = [auto.with_bits(other) for other in auto.given_widths if other != LEFT_ALONE]
    for export in exports:
        options = {"reader_version": export.reader_version, "allow_inexact": export.allow_inexact, "activations": settings.activations}
        for form in export.formats:
            if (refusal := refused_width(form, spec, **options)) is not None:
                return f"{form} {refusal.reason}"
            if (other := as_small_as(form, spec, others)) is not None:
                return f"{form} stores them in as many bytes as {other.bits}"
    return None
