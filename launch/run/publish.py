"""Hands the finished report to the experiment tracker: the table, the pictures, the final figures."""

from typing import TYPE_CHECKING, Any

from ...trainer.loggers import log_image, log_summary, log_table
from ..report.curves import read_curves
from ..report.pictures import draw_all, render
from ..report.tables import HEADINGS, report_rows

if TYPE_CHECKING:
    from ...trainer.metrics import MetricsSink
    from .folder import RunFolder


def publish(report: dict[str, Any], folder: "RunFolder", metrics: "MetricsSink") -> None:
    """Log table, pictures and the last model's figures to every logger that can take them."""
    if not metrics.loggers:
        return
    log_table(metrics.loggers, "stages", HEADINGS, report_rows(report))
    for name, figure in draw_all(report, read_curves(folder.metrics)).items():
        log_image(metrics.loggers, name, render(figure, "png"))
    last = (report["exports"] or report["stages"])[-1]
    figures = {f"final/{name}": value for name, value in (last.get("eval") or {}).items() if value is not None}
    log_summary(metrics.loggers, {**figures, "final/bytes": last["bytes"], "final/parameters": last["parameters"]})
