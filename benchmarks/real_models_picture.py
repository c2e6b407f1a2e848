"""Draws the rows of benchmarks/real_models.py: held-out KL to the bf16 model against the bytes that are served.

python benchmarks/real_models_picture.py benchmarks/results/real_models.json docs/real-models.svg
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import quantization_picture

NAMES = {
    "rtn": "round to nearest",
    "mse": "searched scales",
    "llmcompressor awq": "AWQ, llm-compressor",
    "llmcompressor gptq": "GPTQ, llm-compressor",
    "auto_round auto-round": "AutoRound",
    "llama.cpp": "llama.cpp's types",
    "gptq": "GPTQ",
    "qat": "QAT by KL",
}


def points(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """System -> (megabytes, KL) of its cases; other tools' folders count the bytes of the same scheme, which ours are packed in."""
    values = {(row["case"], row["system"], row["metric"]): row["value"] for row in rows}
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (case, system, metric), kl in values.items():
        size = values.get((case, system, "packed_bytes"), values.get((case, "rtn", "packed_bytes")))
        name = next((name for name in NAMES if system == name or system.startswith(f"{name} ")), None)
        if metric == "kl" and size and name:
            found[name].append((size / 1e6, kl))
    return found


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    named = points(json.loads(source.read_text())["rows"])
    lines = [(NAMES[name], sorted(named[name])) for name in NAMES if name in named]
    quantization_picture.draw_lines(lines, "bytes served, megabytes", "held-out KL(bf16 || quantized), nats", target)
