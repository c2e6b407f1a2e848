"""What a search tried stands in the report as a table and a picture, and rounds as a sentence; a report without them is as before."""

from typing import Any

import numpy as np

from decoct.launch.report.build import markdown_report
from decoct.launch.report.page import render_page
from decoct.launch.report.pictures import draw_all

from .conftest import row

SEARCH = {
    "budget": "60.0% of the decoder layers' parameters",
    "shapes": 42,
    "windows": 8,
    "tokens": [1_000_000, 4_000_000],
    "chosen": "ffn=768,layers=28",
    "tried": [
        {"shape": "ffn=768,layers=28", "parameters": 90_000_000, "cost": 0.58, "kl": 0.75, "distilled": [0.5, 0.25]},
        {"shape": "layers=18", "parameters": 92_000_000, "cost": 0.6, "kl": 0.7, "distilled": [0.625]},
        *({"shape": f"heads={n}", "parameters": 91_000_000, "cost": 0.59, "kl": 1.0 + n} for n in range(12)),
    ],
}


def test_the_table_has_a_column_for_each_round(report: dict[str, Any]) -> None:
    plain = markdown_report(report)
    assert "aligned shapes" not in plain
    assert "search" not in draw_all(report, {})
    report["stages"].append(row("05-prune", "prune", search=SEARCH))
    text = markdown_report(report)
    assert "05-prune chose ffn=768,layers=28 of 42 aligned shapes within 60.0% of the decoder layers' parameters" in text
    assert "for 14 of them, of which 2 more are in report.json." in text
    assert "| shape | parameters | KL as cut | KL after 1,000,000 tokens | KL after 4,000,000 tokens |" in text
    assert "| ffn=768,layers=28 | 90,000,000 | 0.7500 | 0.5000 | 0.2500 |" in text
    assert "| layers=18 | 92,000,000 | 0.7000 | 0.6250 | - |" in text
    assert "heads=9" in text
    assert "heads=10" not in text
    page = render_page(report, {})
    assert "<td>ffn=768,layers=28</td><td>90,000,000</td>" in page
    assert '<figure id="search">' in page
    axes = draw_all(report, {})["search"].axes[0]
    # as cut, and after each of two rounds; then also those of other budgets
    assert [np.shape(points.get_offsets())[0] for points in axes.collections] == [14, 2, 1]
    others = {**SEARCH, "others": [{"shape": "ffn=128", "parameters": 60_000_000, "kl": 2.5}]}
    report["stages"][-1]["search"] = others
    axes = draw_all(report, {})["search"].axes[0]
    assert [np.shape(points.get_offsets())[0] for points in axes.collections] == [1, 14, 2, 1]


def test_a_sentence_names_the_shapes_of_rounds(report: dict[str, Any]) -> None:
    told = [{"shape": "ffn=384", "share": 0.81, "tokens": 16128}, {"shape": "layers=3", "share": 0.61, "tokens": 16384}]
    assert "rounds" not in markdown_report(report)
    report["stages"].append(row("05-prune", "prune", rounds=told))
    wanted = (
        "05-prune cut in 2 rounds and distilled after each: ffn=384 (81.0% of the decoder layers' parameters left, 16,128 tokens); "
        "layers=3 (61.0% of the decoder layers' parameters left, 16,384 tokens)"
    )
    assert wanted in markdown_report(report)
    assert wanted.replace("'", "&#39;") in render_page(report, {})
