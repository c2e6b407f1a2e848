"""Draws the rows of benchmarks/quantization.py: held-out KL to the full model against bits a weight.

python benchmarks/quantization_picture.py benchmarks/results/quantization.json docs/quantization.svg
"""

import json
import re
import sys
from pathlib import Path

NAMES = {
    "rtn": "round to nearest",
    "mse": "searched scales",
    "llm-compressor gptq": "GPTQ, llm-compressor",
    "gptq": "GPTQ",
    "torchao": "QAT, torchao",
    "qat_kl": "QAT, absmax scales",
    "qat_kl_learned": "QAT, learned scales",
}
SCALE_BITS = 16


def points(rows: list[dict[str, object]]) -> list[tuple[str, list[tuple[float, float]]]]:
    """(label, (bits a weight, KL) in groups of 64) of each system; a weight takes its code and its share of a 16-bit scale."""
    found = []
    for system, label in NAMES.items():
        own = []
        for row in rows:
            spec = re.fullmatch(r"w(\d)-g(64)", str(row["case"]))
            if spec and row["system"] == system and row["metric"] == "kl":
                own.append((int(spec[1]) + SCALE_BITS / int(spec[2]), float(str(row["value"]))))
        if own:
            found.append((label, sorted(own)))
    return found


def draw_lines(lines: list[tuple[str, list[tuple[float, float]]]], across: str, up: str, file: Path) -> None:
    """Draw a line of points for each label; KL on a logarithmic axis."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # fixed ids: a picture of the same rows is the same file
    plt.rcParams.update({"svg.hashsalt": "decoct", "font.size": 9})
    figure, axes = plt.subplots(figsize=(6, 3.8))
    for label, own in lines:
        axes.plot(*zip(*own), marker="o", markersize=4, label=label)
    axes.set_yscale("log")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


if __name__ == "__main__":
    rows = json.loads(Path(sys.argv[1]).read_text())["rows"]
    draw_lines(points(rows), "bits a weight, scales included", "held-out KL(full || quantized), nats", Path(sys.argv[2]))
