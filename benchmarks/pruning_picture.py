"""Draws the rows of benchmarks/pruning.py, and writes their table into a page: what each cut costs, and what gets it back.

python benchmarks/pruning_picture.py benchmarks/results/pruning.json docs/pruning.svg docs/pruning.md
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- by benchmarks/pruning_picture.py -->", "<!-- end -->"
FIGURES = ("perplexity", "kl", "top1", "parameters", "bytes", "seconds")
LABELS = {
    "weight_activation": "as cut, weight x activation",
    "block_influence": "as cut, block influence",
    "Torch-Pruning taylor": "as cut, Torch-Pruning (Taylor)",
    "repaired": "repaired",
    "local": "after local distillation",
    "distilled": "distilled",
    "local, distilled": "local, then distilled",
    "Torch-Pruning taylor, distilled": "Torch-Pruning, distilled",
}
"""Systems of the picture, and their labels."""
Values = Mapping[tuple[str, str, str], float]


def values_of(rows: list[dict[str, Any]]) -> Values:
    """(case, system, metric) -> value."""
    return {(row["case"], row["system"], row["metric"]): row["value"] for row in rows}


def table(values: Values) -> list[str]:
    """Lines of a markdown table: one row for each model, in the order of the cases."""
    whole = values["whole", "whole", "parameters"]
    head = ["case", "made by", "KL, nats", "perplexity", "top-1", "parameters", "MB", "speed", "seconds"]
    lines = [f"| {' | '.join(head)} |", f"|---|---|{'---:|' * (len(head) - 2)}"]
    models = dict.fromkeys((case, system) for case, system, metric in values if metric == "perplexity")
    order = list(dict.fromkeys(case for case, _ in models))
    for case, system in sorted(models, key=lambda model: order.index(model[0])):
        own = {metric: values.get((case, system, metric)) for metric in FIGURES}
        speed = values.get((case, "shape", "speed"))
        cells = [
            case, system, _number(own["kl"], ".4f"), _number(own["perplexity"], ".2f"), _number(own["top1"], ".1%"),
            f"{own['parameters'] / whole:.1%}" if own["parameters"] else "", f"{own['bytes'] / 1e6:.2f}" if own["bytes"] else "",
            _number(speed, ".2f"), _number(own["seconds"], ".1f"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def write_table(page: Path, lines: list[str]) -> None:
    """Replace what stands between the two marks of a page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    page.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + rest.split(END)[1], encoding="utf-8")


def draw(values: Values, file: Path) -> None:
    """KL on a logarithmic axis, one column for each shape, one mark for each system."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # fixed ids: a picture of the same rows is the same file
    plt.rcParams.update({"svg.hashsalt": "decoct", "font.size": 9})
    figure, axes = plt.subplots(figsize=(8, 4.2))
    shapes = list(dict.fromkeys(case for case, system, metric in values if metric == "kl" and system in LABELS))
    for mark, (system, label) in zip("osD^vP*X", LABELS.items()):
        points = [(place, values[case, system, "kl"]) for place, case in enumerate(shapes) if (case, system, "kl") in values]
        if points:
            axes.plot(*zip(*points), mark, markersize=5, label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(shapes)), [shape.replace(" ", "\n", 1) for shape in shapes])
    axes.set_xlabel("axis that was cut, share of the decoder layers' parameters that is left")
    axes.set_ylabel("held-out KL(whole || pruned), nats")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


if __name__ == "__main__":
    found = values_of(json.loads(Path(sys.argv[1]).read_text())["rows"])
    draw(found, Path(sys.argv[2]))
    write_table(Path(sys.argv[3]), table(found))
