"""The page stands alone: pictures inside, nothing fetched, user text escaped."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from decoct.launch.report.build import markdown_report, write_report
from decoct.launch.report.curves import read_curves
from decoct.launch.report.page import render_page
from decoct.launch.report.pictures import draw_all, render, training_curves

CURVES = {"01-distill": [{"stage": "01-distill", "step": s, "loss": 3.0 / s, "kl": 1.0 / s} for s in range(1, 9)]}


def test_page_holds_table_pictures_and_recipe_and_loads_nothing(report: dict[str, Any]) -> None:
    page = render_page(report, CURVES)
    assert page.count("<svg") == 3
    assert "compressed-tensors (re-read)" in page
    assert "size-quality" in page
    assert not re.search(r"<(script|link|img|iframe)\b", page)
    assert not re.search(r"""(src|href)\s*=\s*["']https?:""", page.replace('xlink:href="#', ""))
    assert "a &lt;b&gt;bold" in page
    assert "a <b>bold" not in page
    assert "<strong>Note:</strong> 01-distill ends worse on held-out text than it began: &lt;kl&gt;." in page
    assert "transformers: loads it and agrees with the model that was trained: the same token at 100.00% of 128 positions" in page


def test_samples_stand_beneath_their_prompt_and_cannot_break_the_page(report: dict[str, Any]) -> None:
    assert "Samples" not in render_page(report, CURVES)
    report["samples"] = {"prompts": ["one <b>", "two"], "answers": {"teacher": ["t1", "t2\x1b[31m"], "model": ["m1", "m2"]}}
    page = render_page(report, CURVES)
    assert "one &lt;b&gt;" in page
    places = [
        page.index(text) for text in ("one &lt;", "<dd>t1</dd>", "<dd>m1</dd>", '"prompt">two', "<dd>t2\\x1b[31m</dd>", "<dd>m2</dd>")
    ]
    assert places == sorted(places)


def test_pictures_are_the_same_bytes_every_time(report: dict[str, Any]) -> None:
    first, second = (render(draw_all(report, CURVES)["size-quality"], "svg") for _ in range(2))
    assert first == second
    assert render(draw_all(report, CURVES)["curves"], "png").startswith(b"\x89PNG")


def test_picture_of_a_report_without_curves_or_sparsity(report: dict[str, Any]) -> None:
    for row in report["stages"]:
        row["layer_sparsity"] = [0.0, 0.0]
    assert set(draw_all(report, {})) == {"size-quality"}


def test_write_report_writes_three_files_that_agree(report: dict[str, Any], tmp_path: Path) -> None:
    paths = write_report(report, tmp_path)
    assert [p.name for p in paths] == ["report.json", "report.md", "report.html"]
    assert json.loads(paths[0].read_text())["stages"] == report["stages"]
    assert "| teacher |" in paths[1].read_text()
    assert "> **Note:** 01-distill ends worse" in paths[1].read_text()
    assert "log-probabilities within 1e-06 nats" in paths[1].read_text()


def test_curves_take_the_later_of_two_lines_and_leave_out_a_torn_last_one(tmp_path: Path) -> None:
    lines = [{"stage": "a", "step": 1, "loss": 3.0}, {"stage": "a", "step": 2, "loss": 9.0}, {"stage": "a", "step": 2, "loss": 2.0}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"stage": "a", "st')
    assert [line["loss"] for line in read_curves(file)["a"]] == [3.0, 2.0]
    assert read_curves(tmp_path / "none.jsonl") == {}


def test_curves_leave_out_damaged_lines_wherever_they_are(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    bad = b'\xff\n[1]\n{"stage": "a"}\n{"stage": [], "step": 1}\n{"stage": "a", "step": null}\n' + b"[" * 100_000 + b"\n"
    file.write_bytes(b'{"stage": "a", "step": 1, "loss": 3.0, "note": "x"}\n' + bad + b'{"stage": "a", "step": 2, "loss": 2.0}\n')
    assert read_curves(file) == {"a": [{"stage": "a", "step": 1, "loss": 3.0}, {"stage": "a", "step": 2, "loss": 2.0}]}


def test_curves_are_over_tokens_with_held_out_points_and_gaps_where_nothing_was_learnt() -> None:
    lines = [{"stage": "a", "step": 0, "tokens": 0, "held_out_kl": 0.9, "held_out_perplexity": 20.0}]
    lines += [{"stage": "a", "step": s, "tokens": 512 * s, "loss": 1.0 / s, "kl": 0.5 / s} for s in range(1, 5)]
    lines[2] |= {"loss": None, "kl": None}
    lines[4] |= {"held_out_kl": 0.2, "held_out_perplexity": 11.0}
    (axes,) = training_curves({"a": lines}).axes
    trained, _, held_out = axes.get_lines()
    assert np.asarray(trained.get_xdata()).tolist() == [512, 1536, 2048]
    assert np.asarray(held_out.get_xydata()).tolist() == [[0, 0.9], [2048, 0.2]]
    assert axes.get_xlabel() == "tokens"
    alone = [{**line, "kl": None} for line in lines]
    (axes,) = training_curves({"a": alone}).axes
    assert np.asarray(axes.get_lines()[2].get_ydata()).tolist() == [math.log(20.0), math.log(11.0)]


def test_every_panel_of_the_curves_that_stands_empty_is_hidden() -> None:
    curves = {f"{n:02d}-distill": CURVES["01-distill"] for n in range(5)}
    assert [axes.get_visible() for axes in training_curves(curves).axes] == [True] * 5 + [False]


def test_what_of_the_text_is_not_used_is_said(report: dict[str, Any]) -> None:
    assert "Not used" not in markdown_report(report)
    report["protocol"]["left_out"] = {"blank documents": 1200, "conversations: <b>": 3}
    assert "Not used of the text: 1,200 blank documents; 3 conversations: <b>." in markdown_report(report)
    assert "3 conversations: &lt;b&gt;" in render_page(report, {})
