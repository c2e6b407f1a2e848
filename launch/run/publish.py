"""Sends the finished report to the experiment tracker: table, pictures and final figures."""

from typing import TYPE_CHECKING, Any

from ...trainer.loop.loggers import log_image, log_summary, log_table
from ..report.curves import read_curves
from ..report.pictures import draw_all, render
from ..report.tables import report_numbers

if TYPE_CHECKING:
    from ...trainer.loop.metrics import MetricsSink
    from .run_folder import RunFolder


def publish(report: dict[str, Any], folder: "RunFolder", metrics: "MetricsSink") -> None:
    """Log table, pictures and the last model's figures to every logger that can take them."""
    if not metrics.loggers:
        return
    rows = report_numbers(report)
    log_table(metrics.loggers, "stages", tuple(rows[0]), [tuple(row.values()) for row in rows])
    for name, figure in draw_all(report, read_curves(folder.metrics)).items():
        log_image(metrics.loggers, name, render(figure, "png"))
    # the summary of a run in a tracker's list is that of what would be served
    last = (report["exports"] or report["stages"])[-1]
    figures = {f"final/{name}": value for name, value in (last.get("eval") or {}).items() if value is not None}
    figures |= {"final/bytes": last["bytes"], "final/parameters": last["parameters"]}
    log_summary(metrics.loggers, {**figures, **_stage_figures(rows)})


def _stage_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return every number of every row as ``<step>/final_<figure>``, next to the step's curves."""
    return {
        f"{row['step']}/final_{key}": value
        for row in rows
        for key, value in row.items()
        if isinstance(value, int | float) and value is not None
    }
