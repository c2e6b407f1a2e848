"""Draws the two pictures of docs/architecture.md: what rests on what, and what a run does.

    python docs/architecture_picture.py          # writes docs/architecture-folders.svg and docs/architecture-run.svg

Text stays text in the SVG, so that names can be searched and tests/test_site.py can compare them with the folders on disk.
"""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).resolve().parent
INK, SOFT, PAPER = "#1f2933", "#52606d", "#ffffff"


class Hall(NamedTuple):
    """A top folder."""

    name: str
    does: str
    left: float
    bottom: float
    width: float
    height: float
    colour: str
    rows: tuple[tuple[str, ...], ...]
    """Rows of chips: sub-folders, or files at the top of the folder (given with their ending), each with what it is for, line by line."""


LAUNCH = Hall(
    "launch/",
    "the way in, and the oversight",
    0,
    11.4,
    20,
    3.4,
    "#d6e4f5",
    (
        (
            "cli | verbs and | their options",
            "terminal | console, errors | as messages",
            "plan | sizes, memory, | limits, in seconds",
            "run | stages in order, | run folder",
            "jobs | torchrun, Slurm, | Kubernetes",
        ),
        (
            "report | tables, pictures, | pages",
            "answers | generate, chat, | samples",
            "compare | models in | one table",
            "upkeep | runs, clean, | push",
            "doctor | what is | installed",
            "functions | the verbs, | from Python",
        ),
    ),
)
CONFIGS = Hall(
    "configs/",
    "the recipe: schema, loader, checks",
    0,
    9.2,
    20,
    2.0,
    "#dff0e8",
    (
        (
            "recipe.py, loader.py ... | YAML to a typed Recipe, with | line numbers in every message",
            "recipes | the shipped | recipes",
            "architectures | numbers of hub models, | without the hub",
        ),
    ),
)
TRAINER = Hall(
    "trainer/",
    "what touches batches and gradients; Lightning lives here alone",
    0,
    7.0,
    20,
    2.0,
    "#fbeccd",
    (
        (
            "stages | one file | per stage kind",
            "loop | Lightning module, | objective, hooks",
            "data | text to windows | of tokens",
            "evaluation | figures and | gates",
            "tasks | scores on | tasks",
            "trackers | W&B and | others",
            "soft_targets | cached or | served teachers",
            "checkpoints | written once, | read by hash",
            "processes | ranks, DDP, | FSDP2",
        ),
    ),
)
QAT = Hall(
    "qat/",
    "what a quantized weight is, and where it is packed",
    0,
    2.35,
    14.6,
    4.45,
    "#f7dcd6",
    (
        (
            "export | packed formats, | one by one",
            "verify | is it still | that model",
            "runtimes | judges: vLLM, | llama.cpp ...",
            "source | folders proven | before packing",
        ),
        (
            "ptq | rounding | without training",
            "transforms | AWQ, rotations, | before rounding",
            "layers | modules and | hooks in a model",
            "codes | codes and scales | on disk",
            "readers | the oracle: reads | what export wrote",
        ),
        (
            "fake_quant | rounding in the forward, | reference and Triton",
            "spec.py, scheme.py, packing.py ... | the values that all of them share",
        ),
    ),
)
MODELS = Hall(
    "models/",
    "what a network is",
    0,
    0.0,
    14.6,
    2.15,
    "#e6dff2",
    (
        (
            "families.py ... | where layers | and heads are",
            "folder | model folders: | read, write, prove",
            "gguf | files of llama.cpp | as a source",
            "tokenizer | training, checks, | templates",
            "calibration | layer by layer | on text",
            "pruning | channels and | single weights",
            "teachers | where they are | held, and how",
            "common | errors, files, | locks, hashes",
        ),
    ),
)
LOSSES = Hall(
    "losses/",
    "torch alone",
    14.9,
    0.0,
    5.1,
    6.8,
    "#d9eef2",
    (
        ("linear_divergence | hidden states to loss, | logits never held",),
        ("divergences.py ... | the formulas, | one per name",),
        ("sparse.py | top-k and sampled | teachers",),
    ),
)
HALLS = (LAUNCH, CONFIGS, TRAINER, QAT, MODELS, LOSSES)


def box(axes: Axes, left: float, bottom: float, width: float, height: float, *, face: str, edge: str = INK, line: float = 1.0) -> None:
    """A rounded box."""
    shape = FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.14", fc=face, ec=edge, lw=line)
    axes.add_patch(shape)


def draw_hall(axes: Axes, hall: Hall) -> None:
    """A top folder with its chips in rows."""
    box(axes, hall.left, hall.bottom, hall.width, hall.height, face=hall.colour, edge="#9aa5b1")
    top = hall.bottom + hall.height - 0.34
    axes.text(hall.left + 0.25, top, hall.name, fontsize=13, fontweight="bold", color=INK, va="center")
    axes.text(hall.left + 0.55 + 0.2 * len(hall.name), top - 0.01, hall.does, fontsize=9.5, color=SOFT, va="center")
    room = (hall.height - 0.62) / len(hall.rows)
    for index, row in enumerate(hall.rows):
        bottom = hall.bottom + hall.height - 0.6 - (index + 1) * room + 0.06
        parts = [2.0 if ".py" in chip and len(row) in (2, 3) else 1.2 if chip.startswith("fake_quant") else 1.0 for chip in row]
        unit, left = (hall.width - 0.4 - 0.15 * (len(row) - 1)) / sum(parts), hall.left + 0.2
        for chip, part in zip(row, parts, strict=True):
            draw_chip(axes, chip, left, bottom, unit * part, room - 0.14)
            left += unit * part + 0.15


def draw_chip(axes: Axes, chip: str, left: float, bottom: float, width: float, height: float) -> None:
    """A sub-folder: its name, and what it is for."""
    name, *does = chip.split(" | ")
    apart = name == "readers"
    box(axes, left, bottom, width, height, face=PAPER, edge="#b44d3a" if apart else "#cbd2d9", line=1.6 if apart else 0.8)
    middle = left + width / 2
    title(axes, middle, bottom + height - 0.25, name, 10.5)
    note(axes, middle, bottom + (height - 0.42) / 2, "\n".join(does), 8.8)


def folders() -> None:
    """The top folders, each above those that it may import."""
    figure, axes = canvas(20.9, 15.0, -0.1, -0.1)
    for hall in HALLS:
        draw_hall(axes, hall)
    arrow(axes, (20.45, 14.6), (20.45, 0.2))
    note(axes, 20.62, 7.4, "imports run down only", 9.5, rotation="vertical")
    save(figure, "architecture-folders.svg")


STEPS = (
    ("recipe.yaml", "what to do", "#dff0e8", "configs/loader.py"),
    ("Recipe", "typed, checked", "#dff0e8", "configs/recipe.py"),
    ("plan", "sizes, limits", "#d6e4f5", "launch/plan"),
    ("stages", "in order", "#d6e4f5", "launch/run/runner.py"),
    ("report", "what each cost", "#d6e4f5", "launch/report"),
)
STAGES = (
    ("distill", "learn from\nthe teacher", "#fbeccd", "model folder", "config, weights,\ntokenizer, decoct.json"),
    ("prune", "fewer channels,\nor zeros", "#fbeccd", "model folder", "config, weights,\ntokenizer, decoct.json"),
    ("qat", "train through\nthe rounding", "#f7dcd6", "model + codes", "model.safetensors,\nquant/codes.safetensors"),
    ("export", "pack, re-read,\nrun in judges", "#f7dcd6", "packed folders", "compressed-tensors/,\ngguf/ ..."),
    ("evaluate", "gates", "#fbeccd", "rows of the report", "perplexity, KL, top-1,\nbytes"),
)
"""(kind, what it does, colour, what it leaves, what is in that)."""


def run() -> None:
    """What a run does: the recipe on top, the stages below, a folder between any two."""
    figure, axes = canvas(20.4, 8.4, -0.2, -0.2)
    width, gap = 3.1, 1.1
    for index, (name, does, colour, place) in enumerate(STEPS):
        left = index * (width + gap)
        box(axes, left, 6.3, width, 1.5, face=colour, edge="#9aa5b1")
        title(axes, left + width / 2, 7.33, name, 13)
        note(axes, left + width / 2, 6.93, does, 9.5)
        note(axes, left + width / 2, 6.55, place, 8.5, family="monospace")
        if index:
            arrow(axes, (left - gap + 0.08, 7.05), (left - 0.08, 7.05))
    box(axes, 0, 0, 19.9, 5.3, face="#f5f7fa", edge="#cbd2d9")
    title(axes, 1.5, 4.97, "runs/<name>/", 11, family="monospace")
    note(axes, 8.2, 4.97, "one numbered folder for each stage, metrics.jsonl, report.json, report.md, report.html", 9.5)
    arrow(axes, (3 * (width + gap) + width / 2, 6.22), (3 * (width + gap) + width / 2, 5.38))
    for index, (name, does, colour, made, holds) in enumerate(STAGES):
        left = 0.35 + index * 3.95
        box(axes, left, 2.75, 3.2, 1.65, face=colour, edge="#9aa5b1")
        title(axes, left + 1.6, 4.08, name, 12)
        note(axes, left + 1.6, 3.38, does, 9.5)
        box(axes, left, 0.4, 3.2, 1.35, face=PAPER, edge="#9aa5b1")
        title(axes, left + 1.6, 1.38, made, 10)
        note(axes, left + 1.6, 0.82, holds, 8.8)
        arrow(axes, (left + 1.6, 2.67), (left + 1.6, 1.83))
        if index < 3:
            arrow(axes, (left + 3.26, 1.2), (left + 3.9, 2.9))
    save(figure, "architecture-run.svg")


def title(axes: Axes, x: float, y: float, text: str, size: float, **other: Any) -> None:
    """Bold text around a point."""
    axes.text(x, y, text, fontsize=size, fontweight="bold", color=INK, ha="center", va="center", **other)


def note(axes: Axes, x: float, y: float, text: str, size: float, **other: Any) -> None:
    """Soft text around a point."""
    axes.text(x, y, text, fontsize=size, color=SOFT, ha="center", va="center", linespacing=1.15, **other)


def canvas(width: float, height: float, left: float, bottom: float) -> tuple[Figure, Axes]:
    """An empty picture of ``width`` x ``height`` units."""
    figure, axes = plt.subplots(figsize=(width * 0.62, height * 0.62))
    axes.set_xlim(left, left + width)
    axes.set_ylim(bottom, bottom + height)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, axes


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow between two points."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, lw=1.4, color=SOFT))


def save(figure: Figure, name: str) -> None:
    """Write a picture without a date, so that drawing it again changes nothing."""
    figure.savefig(HERE / name, facecolor=PAPER, metadata={"Date": None})
    lines = (HERE / name).read_text().splitlines()
    (HERE / name).write_text("".join(f"{line.rstrip()}\n" for line in lines))  # matplotlib ends lines with spaces
    plt.close(figure)


if __name__ == "__main__":
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "decoct", "font.family": "DejaVu Sans"})
    folders()
    run()
