"""Draws the rows of benchmarks/distillation.py: held-out KL to the teacher against training speed.

python benchmarks/distillation_picture.py benchmarks/results/distillation.json docs/distillation.svg
"""

import json
import sys
from pathlib import Path

NAMES = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "cache_topk": "cache, top-k",
    "cache_sampled": "cache, sampled",
    "cache_hybrid": "cache, hybrid",
    "trl": "TRL (GKD)",
}


def draw(rows: list[dict[str, object]], case: str, file: Path) -> None:
    """One point a system, with its standard deviation over seeds; cross-entropy is left out, it lies far above."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # fixed ids: a picture of the same rows is the same file
    plt.rcParams.update({"svg.hashsalt": "decoct", "font.size": 9})
    seen = {(row["system"], row["metric"]): float(str(row["value"])) for row in rows if row["case"] == case}
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for system, label in NAMES.items():
        if (system, "kl") not in seen:
            continue
        speed = seen[system, "tokens_per_second"] / seen["cross_entropy", "tokens_per_second"]
        axes.errorbar(speed, seen[system, "kl"], yerr=seen.get((system, "kl_sd"), 0), fmt="o", capsize=3, label=label)
    axes.set_xlabel("training speed, cross-entropy alone = 1")
    axes.set_ylabel("held-out KL(teacher || student), nats")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1)
    axes.legend(loc="lower center", ncols=3, frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text())["rows"], sys.argv[3] if len(sys.argv) > 3 else "quickstart", Path(sys.argv[2]))
