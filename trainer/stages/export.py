"""Stage `export`: pack the quantized folder for serving stacks, and check each result with readers that did not write it."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...models.common.errors import UserError
from ...models.folder.model_folder import read_record
from ...qat.export.export import export_folder
from ...qat.runtimes.outcome_words import outcome_text
from ...qat.source.openers import SourceFolder
from ...qat.source.plain_source import CastError
from ...qat.verify.verify import verify_folder
from ..settings import ExportSettings
from .context import StageContext, StageResult
from .coverage import coverage_facts

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.windows import Windows

RUNTIME_POSITIONS = 2048
"""Held-out positions on which runtimes are compared."""


def finish(settings: ExportSettings, context: StageContext, trained: None) -> StageResult:
    """Write one folder per format beside each other (rank 0). The model that goes on is the stage's input."""
    started = time.perf_counter()
    source = SourceFolder(Path(context.input))
    exports = [_export(source, context.folder / form, form, settings, context) for form in settings.formats]
    facts = coverage_facts(context, "packed", read_record(source.path).get("quant", {}).get("modules", []))
    return StageResult(model=None, seconds=time.perf_counter() - started, exports=exports, facts=facts)


def _export(source: SourceFolder, target: Path, form: str, settings: ExportSettings, context: StageContext) -> dict[str, Any]:
    """Write a format, or check what an interrupted start of this stage left whole. What is written here is proven as it is written."""
    if target.exists():
        runtimes, rounding = _verified(source, target)
    else:
        options = {"allow_inexact": settings.allow_inexact, "reader_version": settings.reader_version}
        made = export_folder(source, target, form, tokens=real_tokens(context.run.data.evaluation), **options)
        runtimes, rounding = made.runtimes, made.rounding
    for name, seen in runtimes.items():
        context.say(f"  {form} in {name}: {outcome_text(seen)}")
    if rounding is not None:
        context.say(f"  {form}: {rounding}")
    row = {"format": form, "path": target.name, "exact": rounding is None}
    return {**row, **({"rounding": asdict(rounding)} if rounding else {}), "runtimes": runtimes}


def _verified(source: SourceFolder, target: Path) -> tuple[dict[str, Any], CastError | None]:
    """(what runtimes made of an export that is there, how far it is from its source); UserError when it is not what was written."""
    report = verify_folder(target, source=source, runtimes=False)
    if report.problems:
        raise UserError(f"{target} does not verify: {'; '.join(report.problems)}; delete it and run again")
    export = read_record(target).get("export", {})
    return export.get("runtimes", {}), CastError(**export["rounding"]) if "rounding" in export else None


def real_tokens(windows: "Windows") -> "Tensor | None":
    """int64 [B, S]: the first held-out windows that have no padding; None when there is none."""
    full = [row["input_ids"] for row in map(windows.__getitem__, range(len(windows))) if bool(row["attention_mask"].all())]
    count = -(-RUNTIME_POSITIONS // windows.seq_length)
    return torch.stack(full[:count]) if full else None
