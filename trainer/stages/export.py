"""Stage `export`: pack the quantized folder for serving stacks, and check each export with independent readers."""

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
"""Number of held-out positions on which runtimes are compared."""


def finish(settings: ExportSettings, context: StageContext, trained: None) -> StageResult:
    """Write one folder per format, side by side (rank 0). The next stage continues with the input of this one."""
    started = time.perf_counter()
    source = SourceFolder(Path(context.input))
    exports = [_export(source, context.folder / form, form, settings, context) for form in settings.formats]
    # the modules with codes; the others stay as they are in every format
    facts = coverage_facts(context, "packed", read_record(source.path).get("quant", {}).get("modules", []))
    return StageResult(model=None, seconds=time.perf_counter() - started, exports=exports, facts=facts)


def _export(source: SourceFolder, target: Path, form: str, settings: ExportSettings, context: StageContext) -> dict[str, Any]:
    """Write one format, or verify the complete export of an interrupted earlier start. ``export_folder`` proves a new export itself."""
    # exports appear under their final name by a rename, so an existing one is complete
    if target.exists():
        runtimes, rounding = _verified(source, target)
    else:
        options = {"allow_inexact": settings.allow_inexact, "reader_version": settings.reader_version}
        # writes, reads back, compares with runtimes, and renames last: a failure leaves no export of that name
        made = export_folder(source, target, form, tokens=real_tokens(context.run.data.evaluation), **options)
        runtimes, rounding = made.runtimes, made.rounding
    for name, seen in runtimes.items():
        context.say(f"  {form} in {name}: {outcome_text(seen)}")
    if rounding is not None:
        context.say(f"  {form}: {rounding}")
    row = {"format": form, "path": target.name, "exact": rounding is None}
    return {**row, **({"rounding": asdict(rounding)} if rounding else {}), "runtimes": runtimes}


def _verified(source: SourceFolder, target: Path) -> tuple[dict[str, Any], CastError | None]:
    """(Results of the runtimes, rounding error against the source) of an existing export; UserError when the export has changed."""
    # the record already has the results of the runtimes, which take long to repeat
    report = verify_folder(target, source=source, runtimes=False)
    if report.problems:
        raise UserError(f"{target} does not verify: {'; '.join(report.problems)}; delete it and run again")
    export = read_record(target).get("export", {})
    return export.get("runtimes", {}), CastError(**export["rounding"]) if "rounding" in export else None


def real_tokens(windows: "Windows") -> "Tensor | None":
    """int64 [B, S]: the first held-out windows without padding; None when every window is padded."""
    full = [row["input_ids"] for row in map(windows.__getitem__, range(len(windows))) if bool(row["attention_mask"].all())]
    # round up to whole windows
    count = -(-RUNTIME_POSITIONS // windows.seq_length)
    return torch.stack(full[:count]) if full else None
