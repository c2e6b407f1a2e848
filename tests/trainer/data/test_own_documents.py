"""Text from a data source of the user's: read anew each time, checked, and known by file and options."""

from pathlib import Path
from typing import Any

import pytest

from decoct.models.common.errors import UserError
from decoct.parts import PartError
from decoct.trainer.data.documents import read_documents

from ...support.own_parts import parts_of_text

FILE = """
@parts.data_source("count")
def count(*, until: int = 3, text: str = "number"):
    count.calls = getattr(count, "calls", 0) + 1
    for number in range(until):
        yield f"{text} {number}"

@parts.data_source("talk")
def talk():
    return [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 2

@parts.data_source("one_text")
def one_text():
    return "text"

@parts.data_source("mixed")
def mixed():
    return ["a", 3]

@parts.data_source("blank")
def blank():
    return ["", " "]
"""


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    """settings(name, **keys) of the section data."""
    found = parts_of_text(tmp_path, FILE)

    def make(name: str, **keys: Any) -> Any:
        made = found.settings("data source", name)
        assert made is not None
        return made(**keys)

    return make


def test_documents_come_anew_at_each_reading(settings: Any) -> None:
    chosen = settings("count", until=4)
    documents = read_documents(chosen)
    assert list(documents) == list(documents) == ["number 0", "number 1", "number 2", "number 3"]
    assert chosen.part.target.calls == 3, "once as a check, and twice here"
    assert documents.description == "count of my_parts.py"
    assert list(read_documents(settings("count", until=4, max_documents=2))) == ["number 0", "number 1"]


def test_the_fingerprint_is_of_the_file_and_the_options(settings: Any, tmp_path: Path) -> None:
    def fingerprint(**keys: Any) -> str:
        return read_documents(settings("count", **keys)).fingerprint

    assert fingerprint() == fingerprint(until=3) == fingerprint(seq_length=64)
    assert len({fingerprint(), fingerprint(until=4), fingerprint(text="other"), fingerprint(max_documents=1)}) == 4
    (tmp_path / "changed").mkdir()
    changed = parts_of_text(tmp_path / "changed", FILE + "\n# changed\n").settings("data source", "count")
    assert changed is not None
    assert read_documents(changed()).fingerprint != fingerprint()
    (tmp_path / "moved").mkdir()
    moved = parts_of_text(tmp_path / "moved", FILE).settings("data source", "count")
    assert moved is not None
    assert read_documents(moved()).fingerprint == fingerprint(), "the same file elsewhere"


def test_conversations_are_rows(settings: Any) -> None:
    documents = read_documents(settings("talk", kind="chat"))
    assert documents.chats is not None
    assert [where for where, _ in documents.chats()] == ["conversation 1", "conversation 2"]
    rows: list[Any] = [row for _, row in documents.chats()]
    assert [message["content"] for message in rows[1]["messages"]] == ["hi", "ho"]


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("one_text", {}, r"my_parts.py:15: data source 'one_text' must return an iterable of str; it returned str"),
        ("mixed", {}, r"my_parts.py:19: data source 'mixed' gave a int as document 2; with data.kind: text it must be str"),
        ("talk", {}, r"my_parts.py:11: data source 'talk' gave a dict as document 1; with data.kind: text it must be str"),
        ("count", {"kind": "chat"}, r"my_parts.py:5: data source 'count' gave a str as document 1; with data.kind: chat it must be dict"),
    ],
)
def test_other_things_are_refused_with_the_source_s_place(name: str, keys: dict[str, Any], message: str, settings: Any) -> None:
    with pytest.raises(PartError, match=message):
        list(read_documents(settings(name, **keys)))


def test_a_source_without_text_is_refused(settings: Any) -> None:
    with pytest.raises(UserError, match=r"data\.source: blank of my_parts\.py holds no text"):
        read_documents(settings("blank"))
