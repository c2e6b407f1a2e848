"""Widths that were chosen within a budget, in the report: in words, as a table, and drawn by kind and layer."""

from typing import Any

import numpy as np
import pytest

from decoct.launch.report.bit_widths import draw_widths, width_sentences, width_tables
from decoct.launch.report.build import markdown_report
from decoct.launch.report.page import render_page
from decoct.launch.report.pictures import draw_all

WIDTHS = {
    "model.layers.0.self_attn.q_proj": 4,
    "model.layers.0.mlp.down_proj": 8,
    "model.layers.1.self_attn.q_proj": 2,
    "model.layers.1.mlp.down_proj": 16,
}


@pytest.fixture
def chosen(report: dict[str, Any]) -> dict[str, Any]:
    """The report of a run whose stage qat has chosen widths."""
    report["stages"][4]["bits"] = {
        "budget": "3.5 bits per weight",
        "bits_per_weight": 3.469,
        "bytes": 1_471_872,
        "sensitivity": "cheap",
        "tokens": 16_384,
        "estimated_kl": 0.00937,
        "calibration_kl": {"cheap": 0.0128, "second_order": 0.0125, "2 bits everywhere": 0.1103},
        "chosen_by": "second_order",
        "rank_correlation": {"cheap, second_order": 0.972},
        "widths": WIDTHS,
    }
    return report


def test_a_sentence_says_budget_result_and_how_the_estimates_agree(chosen: dict[str, Any]) -> None:
    (told,) = width_sentences(chosen)
    assert told == (
        "03-qat chose widths within 3.5 bits per weight: 3.469 bits per weight of the linears (1 with 2 bits, 1 with 4 bits, "
        "1 with 8 bits, 1 left alone), by sensitivity (cheap; chosen: second_order) on 16,384 tokens, KL there 0.0125, 0.00937 estimated; "
        "rank correlation of cheap, second_order 0.972"
    )
    assert told in markdown_report(chosen)


def test_a_table_has_a_row_for_each_kind(chosen: dict[str, Any]) -> None:
    assert width_tables(chosen) == [("03-qat", [("self_attn.q_proj", "4 2"), ("mlp.down_proj", "8 16")])]
    assert "| 03-qat: kind | bits of layer 0, 1, ... |\n|---|---|\n| self_attn.q_proj | 4 2 |\n" in markdown_report(chosen)


def test_the_picture_has_a_cell_for_each_kind_in_each_layer(chosen: dict[str, Any]) -> None:
    (axes,) = draw_all(chosen, {})["bits"].axes
    assert axes.get_title() == "03-qat: bits per weight"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["self_attn.q_proj", "mlp.down_proj"]
    assert np.asarray(axes.images[0].get_array()).tolist() == [[4, 2], [8, 16]]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 0): "4", (1, 0): "2", (0, 1): "8", (1, 1): "16"}


def test_layers_without_a_kind_stay_empty() -> None:
    row = {"name": "x", "bits": {"widths": {"layers.0.mixer": 3, "layers.2.mixer": 4, "layers.1.self_attn": 8}}}
    (axes,) = draw_widths([row]).axes
    drawn = np.ma.getmaskarray(np.ma.asarray(axes.images[0].get_array()))
    assert drawn.tolist() == [[False, True, False], [True, False, True]]


def test_the_page_shows_them_all(chosen: dict[str, Any]) -> None:
    page = render_page(chosen, {})
    assert '<figure id="bits">' in page and "<td>self_attn.q_proj</td><td>4 2</td>" in page
    assert "chose widths within 3.5 bits per weight" in page


def test_a_run_that_chose_none_shows_none(report: dict[str, Any]) -> None:
    assert width_sentences(report) == [] and width_tables(report) == [] and "bits" not in draw_all(report, {})
    page = render_page(report, {})
    assert '<figure id="bits">' not in page and "widths by kind of linear" not in page
