"""What every benchmark writes: rows ``{case, system, metric, value, unit}``, as a table, and in a file beside the machine they are from."""

import datetime
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from decoct.launch.run.run_folder import versions


@dataclass(frozen=True)
class Row:
    """One figure."""

    case: str
    system: str
    metric: str
    value: float
    unit: str


def report(rows: list[Row], title: str, file: Path | None) -> None:
    """Print ``rows``; with ``file`` also write them as JSON, with versions, hardware, commit and date."""
    table = Table(title=title)
    for name in ("case", "system", "metric", "value", "unit"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for row in rows:
        table.add_row(row.case, row.system, row.metric, f"{row.value:.4g}", row.unit)
    Console().print(table)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        file.write_text(json.dumps({"date": today, "versions": versions(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
