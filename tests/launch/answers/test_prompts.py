"""Prompts come from the command line, files and stdin; every mistake has one message."""

import io
from pathlib import Path

import pytest

from decoct.launch.answers.prompts import read_prompts
from decoct.models.common.errors import UserError


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch):
    """``stdin(bytes)``: what the process reads."""

    def given(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))

    return given


def test_prompts_keep_the_order_of_the_command_line(tmp_path: Path, stdin) -> None:
    lines, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    lines.write_bytes("one\n\n two\u2028still two\r\n".encode())
    rows.write_text('{"prompt": "three\\nlines"}\n\n{"prompt": "four", "id": 4}\n')
    stdin(b"five\nsix\n")
    assert read_prompts(["zero"], [str(lines), str(rows), "-"]) == [
        "zero", "one", " two\u2028still two", "three\nlines", "four", "five", "six",
    ]  # fmt: skip


def test_stdin_is_one_prompt_where_nothing_else_is_given(stdin) -> None:
    stdin(b"one\ntwo\n")
    assert read_prompts([], []) == ["one\ntwo"]
    stdin(b"one\ntwo\n")
    assert read_prompts(["-"], []) == ["one\ntwo"]


@pytest.mark.parametrize(
    ("given", "content", "said"),
    [
        ([""], b"", "the prompt is empty"),
        (["a", " "], b"", "prompt 2 of 2 is empty"),
        ([], b"", "the prompt is empty"),
        ([], b"\xff\xfe", "stdin is not UTF-8"),
        (["-", "-"], b"x", "can be read once"),
    ],
)
def test_prompts_that_are_none(given: list[str], content: bytes, said: str, stdin) -> None:
    stdin(content)
    with pytest.raises(UserError, match=said):
        read_prompts(given, [])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{', r"a.jsonl:2: is not JSON"),
        ("a.jsonl", b'{"text": "x"}', r"a.jsonl:1: has no text under 'prompt'"),
        ("a.jsonl", b'["x"]', r"a.jsonl:1: has no text under 'prompt'"),
        ("a.txt", b"\n \n", "there is no prompt in it"),
        ("a.txt", b"\xff", "a.txt is not UTF-8"),
    ],
)
def test_files_that_hold_no_prompts(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_prompts([], [str(tmp_path / name)])


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"nowhere.txt cannot be read \(No such file or directory\)"):
        read_prompts([], ["nowhere.txt"])
