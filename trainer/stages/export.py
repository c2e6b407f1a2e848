"""Stage `export`: pack the quantized folder for serving stacks, and check each result with readers that did not write it."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...models.common.errors import UserError
from ...models.folder.model_folder import read_record
from ...qat.export.export import export_folder
from ...qat.runtimes.outcome_words import outcome_text
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
    source = Path(context.input)
    exports = [_export(source, context.folder / form, form, settings, context) for form in settings.formats]
    facts = coverage_facts(context, "packed", read_record(source).get("quant", {}).get("modules", []))
    return StageResult(model=None, seconds=time.perf_counter() - started, exports=exports, facts=facts)


def _export(source: Path, target: Path, form: str, settings: ExportSettings, context: StageContext) -> dict[str, Any]:
    """Write a format, or check what an interrupted start of this stage left whole."""
    if not target.exists():
        options = {"allow_inexact": settings.allow_inexact, "reader_version": settings.reader_version}
        export_folder(source, target, form, tokens=real_tokens(context.run.data.evaluation), **options)
    export = read_record(target).get("export", {})
    runtimes = export.get("runtimes", {})
    report = verify_folder(target, source=source, runtimes=False)
    if report.problems:
        raise UserError(f"{target} does not verify: {'; '.join(report.problems)}; delete it and run again")
    for name, seen in runtimes.items():
        context.say(f"  {form} in {name}: {outcome_text(seen)}")
    rounding = {"rounding": export["rounding"]} if "rounding" in export else {}
    if rounding:
        context.say(f"  {form}: {CastError(**rounding['rounding'])}")
    return {"format": form, "path": target.name, "exact": not rounding, **rounding, "runtimes": runtimes}


def real_tokens(windows: "Windows") -> "Tensor | None":
    """int64 [B, S]: the first held-out windows that have no padding; None when there is none."""
    full = [row["input_ids"] for row in map(windows.__getitem__, range(len(windows))) if bool(row["attention_mask"].all())]
    count = -(-RUNTIME_POSITIONS // windows.seq_length)
    return torch.stack(full[:count]) if full else None
