"""Sends the finished report to the experiment trackers: table, pictures, final figures, and the files themselves."""

from typing import TYPE_CHECKING, Any

from ..report.curves import read_curves
from ..report.pictures import draw_all, render
from ..report.tables import report_numbers

if TYPE_CHECKING:
    from ...trainer.loop.metrics import MetricsSink
    from .run_folder import RunFolder


def publish(report: dict[str, Any], folder: "RunFolder", metrics: "MetricsSink") -> None:
    """Send table, pictures, the last model's figures and the files of the report to every tracker that can take them."""
    if not metrics.trackers:
        return
    rows = report_numbers(report)
    pictures = {name: render(figure, "png") for name, figure in draw_all(report, read_curves(folder.metrics)).items()}
    # the summary of a run in a tracker's list is that of what would be served
    last = (report["exports"] or report["stages"])[-1]
    figures = {f"final/{name}": value for name, value in (last.get("eval") or {}).items() if value is not None}
    figures |= {"final/bytes": last["bytes"], "final/parameters": last["parameters"]}
    files = [folder.path / name for name in ("report.html", "report.md", "report.json", "recipe.yaml")]
    for tracker in metrics.trackers:
        tracker.table("stages", tuple(rows[0]), [tuple(row.values()) for row in rows])
        for name, png in pictures.items():
            tracker.picture(name, png)
        tracker.summary({**figures, **_stage_figures(rows)})
        tracker.files(files)


def _stage_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return every number of every row as ``<step>/final_<figure>``, next to the step's curves."""
    return {
        f"{row['step']}/final_{key}": value
        for row in rows
        for key, value in row.items()
        if isinstance(value, int | float) and value is not None
    }
