"""The widths that stages chose within a budget: sentences, tables and a picture of kinds and layers."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...qat.bit_table import by_kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Report = dict[str, Any]


def width_sentences(report: Report) -> list[str]:
    """Return a sentence for each stage that chose widths: budget, what was reached, and how the estimates agree."""
    told = []
    for row in report["stages"]:
        # rows of other stages, and of earlier versions, have none
        chosen = row.get("bits")
        if not chosen:
            continue
        counts = sorted(Counter(chosen["widths"].values()).items())
        modules = ", ".join(f"{count} left alone" if width == 16 else f"{count} with {width} bits" for width, count in counts)
        kl = f"KL there {chosen['calibration_kl'][chosen['chosen_by']]:.4g}, {chosen['estimated_kl']:.4g} estimated"
        found = f"sensitivity ({chosen['sensitivity']}; chosen: {chosen['chosen_by']}) on {chosen['tokens']:,} tokens, {kl}"
        text = (
            f"{row['name']} chose widths within {chosen['budget']}: {chosen['bits_per_weight']:.3f} bits per weight of the linears "
            f"({modules}), by {found}"
        )
        ranks = "; ".join(f"rank correlation of {names} {value:.3f}" for names, value in chosen["rank_correlation"].items())
        told.append(f"{text}; {ranks}" if ranks else text)
    return told


def width_tables(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (stage, [(kind of linear, widths of its layers in order)]) for each stage that chose widths."""
    return [
        (
            row["name"],
            [(kind, " ".join(str(width) for _, width in sorted(layers.items()))) for kind, layers in by_kind(chosen["widths"]).items()],
        )
        for row in report["stages"]
        if (chosen := row.get("bits"))
    ]


def draw_widths(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Draw the width of each kind of linear (down) in each decoder layer (across), one panel per stage."""
    # Figure without pyplot: no global state, no display, safe in any thread
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    tables = [(row["name"], by_kind(row["bits"]["widths"])) for row in rows]
    height = sum(0.9 + 0.28 * len(kinds) for _, kinds in tables)
    figure = Figure(figsize=(7.5, height), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    for axes, (name, kinds) in zip(panels, tables):
        layers = 1 + max(layer for own in kinds.values() for layer in own)
        # layers without the kind, as in hybrid models, stay empty
        grid = [[own.get(layer, float("nan")) for layer in range(layers)] for own in kinds.values()]
        # equal distances from 2 to 8 bits; what is left alone has the colour of the end
        axes.imshow(grid, aspect="auto", cmap="YlGnBu", vmin=1, vmax=9, interpolation="nearest")
        if layers <= _NUMBERED:
            for place, own in enumerate(kinds.values()):
                for layer, width in own.items():
                    axes.text(layer, place, str(width), ha="center", va="center", fontsize=7, color="white" if width > 5 else "black")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yticks(range(len(kinds)), list(kinds), fontsize=8)
        axes.set_title(f"{name}: bits per weight", fontsize=9)
        axes.set_xlabel("decoder layer", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
    return figure


_NUMBERED = 48
"""Most layers whose cells have their number written in."""
