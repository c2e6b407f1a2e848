"""The pictures of a report, drawn by matplotlib as SVG (page, docs) or PNG (W&B)."""

import io
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from .curves import Curves

_COLOURS = {
    "teacher": "#1f4e79",
    "distill": "#2a9d8f",
    "prune": "#e9a23b",
    "qat": "#7b5ea7",
    "quantize": "#999999",
    "export": "#c0392b",
    "student": "#7f8c8d",
}


def draw_all(report: dict[str, Any], curves: Curves) -> dict[str, "Figure"]:
    """Every picture for which there is something to draw, by name: size-quality, curves, sparsity."""
    drawn = {"size-quality": size_against_quality(report)}
    if curves:
        drawn["curves"] = training_curves(curves)
    if any(row.get("layer_sparsity") and max(row["layer_sparsity"]) > 0 for row in report["stages"]):
        drawn["sparsity"] = layer_sparsity(report)
    return drawn


def _figure(width: float, height: float) -> "Figure":
    # Figure without pyplot: no global state, no display, safe in any thread.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def size_against_quality(report: dict[str, Any]) -> "Figure":
    """Perplexity over bytes of the weight files: the path of the stages, the packed export, the rounded teacher for scale.

    Unpacked quantized folders are left out: they are an intermediate form that nobody serves.
    """
    figure = _figure(7.5, 4.4)
    axes = figure.subplots()
    path = [row for row in report["stages"] if row.get("eval") and row["kind"] not in ("qat", "quantize", "evaluate")]
    path += [{**row, "kind": "export", "name": f"{row['format']} export"} for row in report["exports"] if row.get("eval")]
    points = [(row["bytes"] / 1e6, row["eval"]["perplexity"]) for row in path]
    axes.plot([x for x, _ in points], [y for _, y in points], color="#bbbbbb", linewidth=1, zorder=1)
    for row, (x, y) in zip(path, points):
        axes.scatter(x, y, s=70, color=_COLOURS.get(row["kind"], "#555555"), zorder=3)
        axes.annotate(row["name"], (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)
    for row in (row for row in report["baselines"] if row.get("eval")):
        axes.scatter(row["bytes"] / 1e6, row["eval"]["perplexity"], s=70, marker="X", color="#999999", zorder=2)
        label = f"{row['name']} (no training)"
        axes.annotate(label, (row["bytes"] / 1e6, row["eval"]["perplexity"]), xytext=(6, -12), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("weight files, MB (log)")
    axes.set_ylabel("held-out perplexity, lower is better")
    axes.set_title("Size against quality")
    _plain_ticks(axes)
    axes.margins(x=0.18, y=0.15)
    axes.grid(alpha=0.25)
    return figure


def _plain_ticks(axes: Any) -> None:
    """Megabytes as numbers instead of powers of ten, also between the decades."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
    plain = ScalarFormatter()
    plain.set_scientific(False)
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(NullFormatter())


def training_curves(curves: Curves) -> "Figure":
    """KL to the teacher (or the loss, where there is none) over the optimizer steps, one panel a stage."""
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = _figure(3.4 * columns, 2.6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (stage, lines), axes in zip(curves.items(), panels):
        has_teacher = any(line.get("kl") for line in lines)
        steps, values = [line["step"] for line in lines], [line["kl" if has_teacher else "loss"] for line in lines]
        axes.plot(steps, values, linewidth=0.8, color="#1f4e79", alpha=0.3)
        axes.plot(steps, _smooth(values), linewidth=1.3, color="#1f4e79")
        axes.set_title(stage, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel("KL to teacher, nats" if has_teacher else "cross-entropy, nats", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    for axes in list(panels):
        axes.set_visible(False)
    return figure


def _smooth(values: list[float], share: float = 0.05) -> list[float]:
    """Mean over a window that ends at each point and spans ``share`` of the curve."""
    width = max(1, round(len(values) * share))
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def layer_sparsity(report: dict[str, Any]) -> "Figure":
    """Share of zeros per decoder layer after each stage that has any."""
    rows = [row for row in report["stages"] if row.get("layer_sparsity") and max(row["layer_sparsity"]) > 0]
    figure = _figure(7.5, 2.8)
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        places = [layer + (index - (len(rows) - 1) / 2) * width for layer in range(len(row["layer_sparsity"]))]
        axes.bar(places, row["layer_sparsity"], width=width, label=row["name"], color=_COLOURS.get(row["kind"], "#555555"))
    axes.set_xticks(range(len(rows[0]["layer_sparsity"])))
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("share of zeros")
    axes.set_title("Sparsity of the linear weights")
    axes.legend(fontsize=8)
    return figure


def render(figure: "Figure", form: Literal["svg", "png"]) -> bytes:
    """The figure as a file's bytes; SVG is reproducible (no date, fixed ids)."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "decoct", "svg.fonttype": "none"}):
        figure.savefig(out, format=form, dpi=110, metadata={"Date": None} if form == "svg" else None)
    return out.getvalue()
