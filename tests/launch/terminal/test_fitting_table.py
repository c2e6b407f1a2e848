"""Tables of any console: numbers whole, text wrapped, what does not fit left out with a word."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from decoct.configs import load_recipe
from decoct.launch.plan.ladder import find_shape, ladder
from decoct.launch.plan.make_plan import plan as make_plan
from decoct.launch.plan.show import draw
from decoct.launch.plan.units import size
from decoct.launch.terminal.fitting_table import fitting_table

HEADINGS = ("stage", "parameters", "bytes", "time")
ROWS = [("01-distill of a long name", "1,234,567", "12.34 MB", "1 min 02 s"), ("02-[prune]", "1,234,567", "12.34 MB", "-")]


def drawn(width: int, **more: Any) -> str:
    out = io.StringIO()
    table = fitting_table("a [title]", HEADINGS, ROWS, width, text=("stage",), **more)
    Console(file=out, width=width).print(table)
    assert max(map(len, out.getvalue().splitlines())) <= width
    return out.getvalue()


def test_a_wide_console_has_everything_and_markup_is_text() -> None:
    text = drawn(120, left_out_first=("time",), short={"parameters": "params"})
    assert "a [title]" in text and "02-[prune]" in text and "parameters" in text
    assert "left out" not in text


def test_short_headings_come_before_a_column_goes() -> None:
    text = drawn(45, left_out_first=("time",), short={"parameters": "n"})
    assert "1 min 02 s" in text and "parameters" not in text


def test_columns_go_in_order_and_are_named() -> None:
    text = drawn(42, left_out_first=("time", "bytes"), elsewhere="the file has them")
    assert "columns left out to fit the width: time" in text
    assert "1 min" not in text and "12.34 MB" in text and "1,234,567" in text
    words = " ".join(drawn(30, left_out_first=("time", "bytes"), elsewhere="the file has them").split())
    assert "columns left out to fit the width: bytes, time; the file has them" in words


def test_a_long_word_is_folded() -> None:
    out = io.StringIO()
    Console(file=out, width=40).print(fitting_table(None, ("stage", "n"), [("x" * 60, "12,345")], 40, text=("stage",)))
    assert out.getvalue().count("x") == 60 and "12,345" in out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_table_of_a_plan_is_cut(width: int, tmp_path: Path) -> None:
    out = io.StringIO()
    made = make_plan(load_recipe("qwen3-8b-4b-int4"), gpus=8, gpu_memory=80 * 10**9)
    console = Console(file=out, width=width)
    draw(made, console)
    text = out.getvalue()
    assert "\u2026" not in text
    memory = next(stage.training.memory for stage in made.stages if stage.training)
    assert size(memory.total) in text


def test_the_ladder_keeps_the_total_on_a_narrow_console(capsys: pytest.CaptureFixture[str]) -> None:
    from decoct.launch.plan.ladder import _draw

    shape = find_shape("70B")
    rows = ladder(shape, context=8192, batch=1)
    out = io.StringIO()
    _draw(shape, rows, 8192, 1, Console(file=out, width=80, force_terminal=True, color_system=None))
    assert "\u2026" not in out.getvalue()
    assert all(size(row.served) in out.getvalue() for row in rows)
