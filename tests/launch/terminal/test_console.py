"""The console shows what it is given and obeys none of it."""

import io
import os
import sys

import pytest
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from decoct.launch.terminal.console import CleanConsole, OutputClosedError

EVIL = "\x1b[2J\x1b]0;pwn\x07 name\udcff"


def seen(terminal: bool = False) -> tuple[CleanConsole, io.StringIO]:
    stream = io.StringIO()
    return CleanConsole(file=stream, width=200, force_terminal=terminal, legacy_windows=False), stream


def test_text_tables_and_objects_lose_their_control_characters() -> None:
    console, stream = seen()
    table = Table(EVIL, title=EVIL)
    table.add_row(Text(EVIL))
    for what in (EVIL, table, Text(EVIL), [EVIL]):
        console.print(what, markup=False, highlight=False)
    console.print(EVIL, soft_wrap=True)
    shown = stream.getvalue()
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert shown.count("\\x1b[2J") >= 5
    shown.encode()


def test_a_live_bar_still_moves_the_cursor_and_its_label_does_not() -> None:
    console, stream = seen(terminal=True)
    with Progress(console=console) as bar:
        bar.add_task(EVIL, total=2)
        console.print("beside", style="bold red")
    shown = stream.getvalue()
    assert "\x1b[2K" in shown, "rich clears lines itself"
    assert "\x1b[1;31mbeside" in shown
    assert "\x1b[2J" not in shown
    assert "\x1b]0;pwn" not in shown
    assert "\\x1b[2J" in shown


def test_a_closed_pipe_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(OutputClosedError, match="no longer read"):
            CleanConsole(file=stream).print("x")
