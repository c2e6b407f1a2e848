"""Stage `export`: pack the quantized folder for serving stacks, and check each result with readers that did not write it."""

import time
from pathlib import Path
from typing import Any

from ...models.errors import UserError
from ...qat.export import export_folder
from ...qat.verify import verify_folder
from ..settings import ExportSettings
from .context import StageContext, StageResult


def finish(settings: ExportSettings, context: StageContext, trained: None) -> StageResult:
    """Write one folder per format beside each other (rank 0). The model that goes on is the stage's input."""
    started = time.perf_counter()
    source = Path(context.input)
    exports = [_export(source, context.folder / form, form, context) for form in settings.formats]
    return StageResult(model=None, seconds=time.perf_counter() - started, exports=exports)


def _export(source: Path, target: Path, form: str, context: StageContext) -> dict[str, Any]:
    if not target.exists():
        export_folder(source, target, form)
    report = verify_folder(target, source=source)
    if report.problems:
        raise UserError(f"{target} does not verify: {'; '.join(report.problems)}; delete it and run again")
    for name, seen in report.runtimes.items():
        context.console.print(f"  {form} in {name}: {', '.join(f'{k} {v}' for k, v in seen.items() if v is not None)}", highlight=False)
    return {"format": form, "path": target.name, "exact": True, "runtimes": report.runtimes}
