"""`decoct chat`: lines from a pipe, and what someone types."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from decoct.launch.answers.answer import Sampling, answer
from decoct.launch.cli.chat_verb import run_chat
from decoct.models.common.errors import UserError

from ..answers.conftest import make_model

Talk = Callable[[str], str]
LONG = "the cat sat " * 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture
def piped(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """``piped(text)``: the answers to lines from a pipe."""

    def talk(text: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        run_chat(str(model), None, None, "fp32", Sampling(max_tokens=4))
        return capsys.readouterr().out

    return talk


def test_each_line_of_a_pipe_is_a_message(piped: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    monkeypatch.setattr(
        "decoct.launch.answers.conversation.answer",
        lambda opened, ids, *arguments, **options: lengths.append(len(ids)) or answer(opened, ids, *arguments, **options),
    )
    once = piped("hello\n")
    assert once.endswith("\n")
    assert piped("hello\n\n/new\nhello") == once * 2
    assert lengths[0] == lengths[1] == lengths[2], "/new forgets the first turn; a blank line is no message"
    piped("hello\nhello\n")
    assert lengths[4] > lengths[3], "the first turn is remembered"


def test_a_pipe_ends_at_a_message_that_does_not_fit(piped: Talk) -> None:
    with pytest.raises(UserError, match="shorten the prompt"):
        piped(f"hello\n{LONG}\nhello\n")


def test_at_a_terminal_a_refused_message_and_ctrl_c_lead_to_the_next(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed: list[Any] = [LONG, KeyboardInterrupt, "hello", EOFError]

    def read(_: str) -> str:
        one = typed.pop(0)
        if isinstance(one, str):
            return one
        raise one

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    run_chat(str(model), None, None, "fp32", Sampling(max_tokens=4))
    seen = capsys.readouterr()
    assert not typed, "it ends at Ctrl-D"
    assert "Ctrl-D ends" in seen.out
    assert "shorten the prompt" in seen.err
    assert "4 tokens" in seen.err
