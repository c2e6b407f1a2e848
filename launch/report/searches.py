"""What a search for the shape of a budget tried: as a table, and as a picture of parameters against KL."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Report = dict[str, Any]
SHOWN = 12
"""Shapes of each search in the tables; report.json has all."""


def searches(report: Report) -> list[tuple[str, dict[str, Any]]]:
    """(stage, what it tried) of each stage that searched a shape."""
    return [(row["name"], row["search"]) for row in report["stages"] if row.get("search")]


def search_table(search: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of the shapes that were measured, the best first."""
    rounds = max((len(row.get("distilled", ())) for row in search["tried"]), default=0)
    headings = ["shape", "parameters", "KL as cut", *(f"KL after {tokens:,} tokens" for tokens in search["tokens"][:rounds])]
    rows = []
    for row in search["tried"][:SHOWN]:
        trained = [f"{kl:.4f}" for kl in row.get("distilled", ())]
        rows.append([row["shape"], f"{row['parameters']:,}", f"{row['kl']:.4f}", *trained, *["-"] * (rounds - len(trained))])
    return headings, rows


def search_words(stage: str, search: dict[str, Any]) -> str:
    """A sentence about a search."""
    more = len(search["tried"]) - SHOWN
    return (
        f"{stage} chose {search['chosen']} of {search['shapes']:,} aligned shapes within {search['budget']}; the KL from its input is "
        f"measured on {search['windows']} windows of calibration text for {len(search['tried'])} of them"
        + (f", of which {more} more are in report.json" if more > 0 else "")
    )


def search_markdown(report: Report) -> list[str]:
    """The tables in Markdown, line by line; [] without a search."""
    lines: list[str] = []
    for stage, search in searches(report):
        headings, rows = search_table(search)
        lines += ["", f"{search_words(stage, search)}.", "", "| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    return [*lines, ""] if lines else []


def draw_searches(report: Report, figure: "Figure") -> "Figure":
    """Draw the KL of the shapes over their parameters, one panel per search: as cut, and after each round of short distillation."""
    found = searches(report)
    panels = figure.subplots(1, len(found), squeeze=False).flat
    for (stage, search), axes in zip(found, panels, strict=True):
        tried = search["tried"]
        drawn = {"other budgets, as cut": (search.get("others", []), "#dddddd"), "as cut": (tried, "#999999")}
        for label, (rows, colour) in drawn.items():
            if rows:
                axes.scatter([row["parameters"] / 1e6 for row in rows], [row["kl"] for row in rows], s=28, color=colour, label=label)
        for number, tokens in enumerate(search["tokens"]):
            points = [(row["parameters"] / 1e6, row["distilled"][number]) for row in tried if len(row.get("distilled", ())) > number]
            if points:
                axes.scatter(*zip(*points, strict=True), s=28, label=f"after {tokens:,} tokens")
        best = tried[0]
        axes.annotate(best["shape"], (best["parameters"] / 1e6, best.get("distilled", [best["kl"]])[-1]), fontsize=7)
        axes.set_title(f"{stage}: {search['budget']}", fontsize=9)
        axes.set_xlabel("parameters, millions", fontsize=8)
        axes.set_ylabel("KL from the input of the stage, nats", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.margins(x=0.18, y=0.18)
        axes.legend(fontsize=7)
    return figure
