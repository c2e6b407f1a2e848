import io
from typing import Any

import pytest
from rich.console import Console

from decoct.launch.report.tables import (
    HEADINGS,
    LEFT_OUT_FIRST,
    WIDE,
    count,
    duration,
    headings,
    report_markdown,
    report_numbers,
    report_rows,
    table_size,
    terminal_table,
)

OTHERS = ("compressed-tensors (re-read)", "teacher rounded to int4 (for scale)")


def test_rows_hold_teacher_stages_export_and_baseline_in_order(report: dict[str, Any]) -> None:
    rows = report_rows(report)
    names = [row[0] for row in rows]
    assert names == [
        "teacher",
        "00-student",
        "01-distill",
        "02-prune",
        "03-qat",
        "compressed-tensors (re-read)",
        "teacher rounded to int4 (for scale)",
    ]
    assert all(len(row) == len(HEADINGS) for row in rows)
    assert rows[3][5] == "30.0%"
    assert rows[5][2:5] == ("1.40 MB", "1.40 MB", "4.48")


def test_a_quantized_folder_has_the_size_that_is_served_and_its_own_beside_it(report: dict[str, Any]) -> None:
    quantized = next(row for row in report_rows(report) if row[0] == "03-qat")
    assert quantized[HEADINGS.index("size") : HEADINGS.index("bits/weight") + 1] == ("1.39 MB", "10.00 MB", "4.45")


def test_reports_of_before_packed_sizes_still_have_a_table(report: dict[str, Any]) -> None:
    for row in report["stages"]:
        for key in ("packed_bytes", "packed_bits_per_weight", "change"):
            row.pop(key, None)
    quantized = next(row for row in report_rows(report) if row[0] == "03-qat")
    assert quantized[HEADINGS.index("size")] == "10.00 MB"


def test_change_is_told_with_its_sign(report: dict[str, Any]) -> None:
    column = {row[0]: row[HEADINGS.index("change")] for row in report_rows(report)}
    assert (column["teacher"], column["00-student"], column["01-distill"]) == ("-", "+150.00%", "-12.50%")


def test_errors_stand_beside_figures_and_a_change_within_them_is_none(report: dict[str, Any]) -> None:
    report["stages"][1]["eval"] |= {"perplexity_se": 0.5, "kl_se": 0.0123}
    report["stages"][1]["change"] |= {"perplexity_se": 0.25}
    report["stages"][2]["change"] |= {"perplexity_se": 0.07}
    rows = {row[0]: dict(zip(HEADINGS, row)) for row in report_rows(report)}
    assert rows["00-student"]["perplexity"] == "10.000 ±0.500"
    assert rows["00-student"]["KL"] == "0.2500 ±0.0123"
    assert rows["00-student"]["change"] == "+150.00% ±25.00%"
    assert rows["01-distill"]["change"] == "none seen ±7.00%"
    assert rows["01-distill"]["KL"] == "0.2500"


def score(value: float, **more: Any) -> dict[str, Any]:
    how = {"metric": "acc", "items": 10, "shots": 0, "limit": None, "batch": None, "seed": 0, "source": "decoct"}
    return {**how, "score": value, "stderr": 0.011, "higher_is_better": True, **more}


def test_tasks_are_columns_behind_the_others(report: dict[str, Any]) -> None:
    report["stages"][0]["tasks"] = {"cloze": score(0.452)}
    report["exports"][0]["tasks"] = {"cloze": score(0.4), "ppl": score(12.5, higher_is_better=False, stderr=None)}
    assert headings(report) == (*HEADINGS, "cloze", "ppl")
    rows = {row[0]: row[-2:] for row in report_rows(report)}
    assert rows["teacher"] == ("45.2% ±1.1%", "-")
    assert rows["01-distill"] == ("-", "-")
    assert rows["compressed-tensors (re-read)"] == ("40.0% ±1.1%", "12.500")
    numbers = {row["step"]: row for row in report_numbers(report)}
    assert numbers["teacher"]["task_cloze"] == 0.452
    assert numbers["teacher"]["task_ppl"] is None
    assert {tuple(row) for row in numbers.values()} == {tuple(numbers["teacher"])}, "every row has the same columns"
    out = io.StringIO()
    Console(file=out, width=80).print(terminal_table(report, 80))
    assert "cloze" in out.getvalue()


def test_markdown_table_has_a_cell_for_every_heading(report: dict[str, Any]) -> None:
    lines = report_markdown(report).splitlines()
    assert {line.count("|") for line in lines} == {len(HEADINGS) + 1}


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0, "-"), (999, "999"), (1_710_000_000, "1.71B"), (2_550_000, "2.55M"), (65_536, "65.5k")]
)
def test_count(value: int | None, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(("value", "text"), [(12, "12 B"), (1_500, "1.50 kB"), (3_420_000_000, "3.42 GB")])
def test_size(value: int, text: str) -> None:
    assert table_size(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.2, "1 s"), (59.4, "59 s"), (61, "1 min 01 s"), (3661, "1 h 01 min")])
def test_duration(value: float | None, text: str) -> None:
    assert duration(value) == text


@pytest.mark.parametrize("width", [60, 80, 100, 120, WIDE])
def test_no_number_is_cut_at_any_common_width(width: int, report: dict[str, Any]) -> None:
    report["stages"][1]["eval"] = {**report["stages"][1]["eval"], "perplexity": 123456.789}
    out = io.StringIO()
    Console(file=out, width=width).print(terminal_table(report, width))
    text = out.getvalue()
    assert "\u2026" not in text
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    told = words.partition("columns left out to fit the width: ")[2].partition(";")[0].split(", ")
    missing = [heading for heading in HEADINGS if heading in told]
    assert missing == ([] if width == WIDE else [heading for heading in told if heading])
    for place, heading in enumerate(HEADINGS):
        if place and heading not in missing:
            assert all(row[place] in text for row in report_rows(report)), heading


def test_four_columns_always_stand() -> None:
    assert set(HEADINGS) - set(LEFT_OUT_FIRST) == {"step", "size", "perplexity", "KL"}
