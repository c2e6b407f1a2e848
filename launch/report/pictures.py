"""Draws the pictures of a report with matplotlib, as SVG (page, docs) or PNG (W&B)."""

import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from .bit_widths import draw_widths
from .curves import Curves
from .labels import place_labels
from .searches import draw_searches, searches
from .tables import count, served

_TRAINED, _HELD_OUT = "#1f4e79", "#c0392b"
_COLOURS = {
    "teacher": "#1f4e79",
    "distill": "#2a9d8f",
    "prune": "#c77d0a",
    "qat": "#7b5ea7",
    "quantize": "#999999",
    "export": "#c0392b",
    "student": "#7f8c8d",
}


def draw_all(report: dict[str, Any], curves: Curves) -> dict[str, "Figure"]:
    """Return every picture for which there is data, by name: size-quality, search, curves, sparsity, bits."""
    drawn = {"size-quality": size_against_quality(report)}
    if found := searches(report):
        drawn["search"] = draw_searches(report, _figure(5.5 * len(found), 3.6))
    if curves:
        drawn["curves"] = training_curves(curves)
    if any(row.get("layer_sparsity") and max(row["layer_sparsity"]) > 0 for row in report["stages"]):
        drawn["sparsity"] = draw_layer_sparsity(report)
    if any(row.get("bits") for row in report["stages"]):
        drawn["bits"] = draw_widths([row for row in report["stages"] if row.get("bits")])
    return drawn


def _figure(width: float, height: float) -> "Figure":
    # Figure without pyplot: no global state, no display, safe in any thread.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def size_against_quality(report: dict[str, Any], *, connected: bool = True) -> "Figure":
    """Draw perplexity over bytes as served: the path of the stages, the packed export, and the rounded teacher for comparison.

    If there is an export, the folder with its codes is left out, because it is the same model. Rows without a size (hub ids) or with an
    infinite perplexity are left out too. Without ``connected`` no line joins the rows: they are models, not steps.
    """
    figure = _figure(7.5, 4.6)
    axes = figure.subplots()
    twice = ("qat", "quantize", "evaluate") if report["exports"] else ("evaluate",)
    path = [row for row in report["stages"] if _has_point(row) and row["kind"] not in twice]
    path += [{**row, "kind": "export", "name": f"{row['format']} export"} for row in report["exports"] if _has_point(row)]
    others = [row for row in report["baselines"] if _has_point(row)]
    if connected:
        axes.plot(*zip(*map(_point, path)), color="#bbbbbb", linewidth=1, zorder=1)
    for row in path:
        axes.scatter(*_point(row), s=70, color=_COLOURS.get(row["kind"], "#555555"), zorder=3)
    for row in others:
        axes.scatter(*_point(row), s=70, marker="X", color="#999999", zorder=2)
    axes.set_xscale("log")
    axes.set_xlabel("size as served, MB (log)")
    axes.set_title("Size against quality")
    heights = [_point(row)[1] for row in (*path, *others)]
    far = bool(heights) and max(heights) > _FAR * min(heights)
    axes.set_yscale("log" if far else "linear")
    axes.set_ylabel(f"held-out perplexity{' (log)' if far else ''}, lower is better")
    _plain_ticks(axes.xaxis)
    if far:
        _plain_ticks(axes.yaxis)
    # room for the labels of the outermost points
    axes.margins(x=0.18, y=0.18)
    axes.grid(alpha=0.25)
    names = [row["name"] for row in path] + [f"{row['name']} (no training)" for row in others]
    colours = [_COLOURS.get(row["kind"], "#555555") for row in path] + ["#777777" for _ in others]
    place_labels(axes, [_point(row) for row in (*path, *others)], names, colours)
    return figure


_FAR = 4
"""Ratio of perplexities above which a linear axis would press all but the worst together."""


def _has_point(row: dict[str, Any]) -> bool:
    return bool(row.get("eval")) and bool(served(row, "bytes")) and math.isfinite(row["eval"]["perplexity"])


def _point(row: dict[str, Any]) -> tuple[float, float]:
    """Return (megabytes, perplexity)."""
    return served(row, "bytes") / 1e6, row["eval"]["perplexity"]


def _plain_ticks(axis: Any) -> None:
    """Label an axis with plain numbers instead of powers of ten, also between the decades."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
    plain = ScalarFormatter()
    plain.set_scientific(False)
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(NullFormatter())


def training_curves(curves: Curves) -> "Figure":
    """Draw the KL to the teacher (the loss without one) over the training tokens, one panel per stage; held-out figures are points."""
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = _figure(3.4 * columns, 2.6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (stage, lines), axes in zip(curves.items(), panels):
        has_teacher = any(line.get("kl") for line in lines)
        figures = _points(lines, "kl" if has_teacher else "loss")
        # the training loss is a cross-entropy, so a perplexity is drawn as its logarithm, on the same axis
        held_out = _points(lines, "held_out_kl" if has_teacher else "held_out_perplexity", (lambda x: x) if has_teacher else math.log)
        axes.plot(*zip(*figures), linewidth=0.8, color=_TRAINED, alpha=0.3)
        axes.plot([x for x, _ in figures], _smooth([y for _, y in figures]), linewidth=1.3, color=_TRAINED, label="training")
        if held_out:
            axes.plot(*zip(*held_out), "o-", markersize=3.5, linewidth=1, color=_HELD_OUT, label="held out")
            axes.legend(fontsize=7)
        axes.set_title(stage, fontsize=9)
        axes.set_xlabel("tokens" if any("tokens" in line for line in lines) else "step", fontsize=8)
        axes.set_ylabel("KL to teacher, nats" if has_teacher else "cross-entropy, nats", fontsize=8)
        axes.xaxis.set_major_locator(_few())
        # count() writes 0 as '-', which is no number on an axis
        axes.xaxis.set_major_formatter(lambda value, _: count(round(value)) if value else "0")
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    # zip has taken one panel per stage; what is left of the grid stays empty
    for axes in list(panels):
        axes.set_visible(False)
    return figure


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, integer=True)


def _points(lines: list[dict[str, Any]], figure: str, scale: Callable[[float], float] = lambda x: x) -> list[tuple[float, float]]:
    """Return (tokens, value) of the lines that have the figure; the step stands in for missing tokens."""
    chosen = [line for line in lines if line.get(figure) is not None]
    return [(line["step"] if line.get("tokens") is None else line["tokens"], scale(line[figure])) for line in chosen]


def _smooth(values: list[float], share: float = 0.05) -> list[float]:
    """Return the mean over a window that ends at each point and spans ``share`` of the curve."""
    width = max(1, round(len(values) * share))
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def draw_layer_sparsity(report: dict[str, Any]) -> "Figure":
    """Draw the share of zeros per decoder layer, after each stage that has zeros."""
    rows = [row for row in report["stages"] if row.get("layer_sparsity") and max(row["layer_sparsity"]) > 0]
    # `evaluate` measures the model of the row before it, unless it is the only row
    rows = [row for row in rows if row["kind"] != "evaluate"] or rows
    figure = _figure(7.5, 2.8)
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        # the bars of one layer stand side by side, centred on its number
        places = [layer + (index - (len(rows) - 1) / 2) * width for layer in range(len(row["layer_sparsity"]))]
        axes.bar(places, row["layer_sparsity"], width=width, label=row["name"], color=_COLOURS.get(row["kind"], "#555555"))
    axes.set_xticks(range(len(rows[0]["layer_sparsity"])))
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("share of zeros")
    axes.set_title("Sparsity of the linear weights")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def render(figure: "Figure", form: Literal["svg", "png"]) -> bytes:
    """Return the figure as the bytes of a file; SVG is reproducible (no date, fixed ids)."""
    import matplotlib

    out = io.BytesIO()
    # text stays text, which can be selected and searched
    with matplotlib.rc_context({"svg.hashsalt": "decoct", "svg.fonttype": "none"}):
        figure.savefig(out, format=form, dpi=110, metadata={"Date": None} if form == "svg" else None)
    return out.getvalue()
