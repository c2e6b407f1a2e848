"""Labels of a picture cover neither each other nor a point, however close the points lie."""

import random
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from decoct.launch.report.labels import overlap, place_labels
from decoct.launch.report.pictures import draw_layer_sparsity, render, size_against_quality


def boxes(figure: Any) -> tuple[list[Any], list[Any], Any]:
    """Boxes in pixels of the labels that are drawn, of the points, and of the axes."""
    (axes,) = figure.axes
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    extents = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
    points = [axes.transData.transform(offset) for dots in axes.collections for offset in dots.get_offsets()]
    inside = axes.get_window_extent(renderer)
    return [(e.x0, e.y0, e.x1, e.y1) for e in extents], [(x - 5, y - 5, x + 5, y + 5) for x, y in points], inside


def check(figure: Any, labels: int) -> None:
    texts, points, inside = boxes(figure)
    assert len(texts) == labels
    assert all(overlap(one, other) == 0 for one, other in combinations(texts, 2))
    assert all(overlap(text, point) == 0 for text in texts for point in points)
    assert all(inside.x0 <= t[0] and t[2] <= inside.x1 and inside.y0 <= t[1] and t[3] <= inside.y1 for t in texts)


def row(name: str, kind: str, size: float, perplexity: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, "bytes": round(size * 1e6), "eval": {"perplexity": perplexity}, **more}


def quickstart() -> dict[str, Any]:
    """The run whose labels once lay on each other."""
    stages = [
        row("teacher", "teacher", 3.94, 101.468),
        row("01-distill", "distill", 3.15, 104.582),
        row("02-prune", "prune", 2.71, 105.610),
        row("03-recover", "distill", 2.71, 104.067),
        row("04-prune", "prune", 2.71, 103.176),
        row("05-qat", "qat", 5.42, 102.956, packed_bytes=1_300_000),
    ]
    export = {**row("x", "export", 1.31, 102.956), "format": "compressed-tensors"}
    return {"stages": stages, "exports": [export], "baselines": [row("teacher rounded to int4", "quantize", 1.64, 101.750)]}


def test_labels_of_the_quickstart_stand_alone() -> None:
    check(size_against_quality(quickstart()), 7)


def test_three_exports_of_one_model_can_be_told_apart() -> None:
    report = quickstart()
    report["exports"] = [{**report["exports"][0], "format": name} for name in ("compressed-tensors", "gguf", "gptq")]
    check(size_against_quality(report), 9)


@pytest.mark.parametrize("seed", range(5))
def test_labels_of_twelve_points_in_a_heap(seed: int) -> None:
    rng = random.Random(seed)
    report = quickstart()
    report["stages"] += [row(f"{n:02d}-another-stage", "distill", 3 + rng.random() / 50, 104 + rng.random() / 5) for n in range(6, 11)]
    check(size_against_quality(report), 12)


def test_without_an_export_the_folder_of_codes_is_drawn_at_its_packed_size() -> None:
    (axes,) = size_against_quality({**quickstart(), "exports": []}).axes
    assert np.asarray(axes.collections[5].get_offsets())[0, 0] == pytest.approx(1.3)


def test_a_student_far_from_its_teacher_gets_a_logarithmic_axis() -> None:
    report = quickstart()
    assert size_against_quality(report).axes[0].get_yscale() == "linear"
    report["stages"].insert(1, row("00-student", "student", 3.15, 9000.0))
    assert size_against_quality(report).axes[0].get_yscale() == "log"


def test_rows_without_a_size_or_a_finite_perplexity_are_left_out() -> None:
    report = quickstart()
    report["stages"][0]["bytes"] = None
    report["stages"][1]["eval"]["perplexity"] = float("inf")
    check(size_against_quality(report), 5)
    assert render(size_against_quality({"stages": [], "exports": [], "baselines": []}), "png")


def test_a_label_that_is_far_from_its_point_is_tied_to_it() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.scatter([0, 1] + [0.5] * 9, [0, 1] + [0.5] * 9)
    labels = place_labels(axes, [(0.5, 0.5)] * 9, [f"label {n}" for n in range(9)], ["black"] * 9)
    assert len(labels) == 9
    assert sum(not text.get_text() for text in axes.texts) >= 5


def test_the_legend_of_the_zeros_lies_beside_the_bars() -> None:
    report = quickstart()
    report["stages"][4]["layer_sparsity"] = [0.3, 0.3]
    report["stages"].append(row("06-evaluate", "evaluate", 1.3, 102.9, layer_sparsity=[0.3, 0.3]))
    figure = draw_layer_sparsity(report)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["04-prune"], "evaluate judges the same model"
    assert legend.get_window_extent(renderer).x0 >= figure.axes[0].get_window_extent(renderer).x1
    report["stages"] = report["stages"][-1:]
    assert [text.get_text() for text in draw_layer_sparsity(report).legends[0].get_texts()] == ["06-evaluate"]
