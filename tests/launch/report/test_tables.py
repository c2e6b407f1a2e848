import io
from typing import Any

import pytest
from rich.console import Console

from decoct.launch.report.tables import HEADINGS, count, duration, markdown_table, report_rows, size, terminal_table


def test_rows_hold_teacher_stages_export_and_baseline_in_order(report: dict[str, Any]) -> None:
    rows = report_rows(report)
    names = [row[0] for row in rows]
    assert names == ["teacher", "01-distill", "02-prune", "03-qat", "compressed-tensors (re-read)", "teacher rounded to int4 (for scale)"]
    assert all(len(row) == len(HEADINGS) for row in rows)
    assert rows[2][4] == "30.0%"
    assert rows[4][2:4] == ("1.40 MB", "4.48")


def test_markdown_table_has_a_cell_for_every_heading(report: dict[str, Any]) -> None:
    lines = markdown_table(report).splitlines()
    assert {line.count("|") for line in lines} == {len(HEADINGS) + 1}


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0, "-"), (999, "999"), (1_710_000_000, "1.71B"), (2_550_000, "2.55M"), (65_536, "65.5k")]
)
def test_count(value: int | None, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(("value", "text"), [(12, "12 B"), (1_500, "1.50 kB"), (3_420_000_000, "3.42 GB")])
def test_size(value: int, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.2, "1 s"), (59.4, "59 s"), (61, "1 min 01 s"), (3661, "1 h 01 min")])
def test_duration(value: float | None, text: str) -> None:
    assert duration(value) == text


@pytest.mark.parametrize("width", [80, 100, 150])
def test_no_number_is_cut_at_any_common_width(width: int, report: dict[str, Any]) -> None:
    out = io.StringIO()
    Console(file=out, width=width).print(terminal_table(report, width))
    text = out.getvalue()
    assert "\u2026" not in text
    assert max(map(len, text.splitlines())) <= width
    for number in ("2.5M", "1.40 MB", "4.48", "30.0%", "10.000", "0.2500", "75.0%"):
        assert number in text
