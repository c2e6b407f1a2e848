"""Output that another program reads: as it is, and a reader that goes away ends the verb in silence."""

import io
import json
import os
import subprocess
import sys

import pytest

from decoct.launch.terminal.written import write_json, write_out

VERB = """
from decoct.launch.terminal.written import QuietEndConsole, write_out
import sys
console = QuietEndConsole()
for _ in range(100_000):
    {line}
print("went on", file=sys.stderr)
"""


def test_a_terminal_gets_no_control_characters_and_a_pipe_gets_the_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_out("a\x1b[31mb\r\n")
    assert capsys.readouterr().out == "a\x1b[31mb\r\n"
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    monkeypatch.setattr("sys.stdout", terminal)
    write_out("a\x1b[31mb\n")
    assert terminal.getvalue() == "a\\x1b[31mb\n"


def test_json_has_no_numbers_that_readers_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    write_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": "é"})
    written = capsys.readouterr().out
    assert json.loads(written) == {"a": None, "b": [None, 1.5], "c": "é"}
    assert "é" in written


@pytest.mark.parametrize("line", ["write_out('x' * 100 + chr(10))", "console.print('x' * 100)"])
def test_a_closed_pipe_ends_in_silence(line: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", VERB.format(line=line)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0
    process.stderr.close()
