"""Rows of every usual shape become the same conversation; what a model of text cannot read says why."""

import json
from typing import Any

import pytest

from decoct.trainer.data.conversations import Conversation, is_conversation, read_conversation

ASKED, ANSWERED = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}
TWO = [ASKED, ANSWERED]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TWO},
        {"messages": json.dumps(TWO)},
        {"messages": None, "prompt": "one?", "completion": "two"},
        {"messages": [{**ASKED, "name": None, "tool_calls": None}, {**ANSWERED, "weight": 1}]},
        {"messages": [{"role": "User", "content": [{"type": "text", "text": "one?"}]}, {"role": "model", "content": ["two"]}]},
        {"conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two"}]},
        {"conversation": TWO},
        {"prompt": "one?", "completion": "two"},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"prompt": ASKED, "completion": "two"},
        {"prompt": "one?", "response": "two"},
        {"question": "one?", "answer": "two"},
        {"instruction": "one?", "input": "", "output": "two"},
        {"instruction": "one?", "input": None, "output": "two", "system": ""},
    ],
)
def test_shapes_of_the_same_conversation(row: dict[str, Any]) -> None:
    assert read_conversation(row) == Conversation(TWO, [False, True])
    assert is_conversation(row.keys())


def test_alpaca_with_input_system_and_history() -> None:
    row = {"instruction": "add", "input": "1 1", "output": "2", "system": "be brief", "history": [["hi", "hello"]]}
    messages = read_conversation(row).messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in messages] == ["be brief", "hi", "hello", "add\n1 1", "2"]


def test_text_parts_are_joined_by_line_ends() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}, {"text": "three"}]
    assert read_conversation({"messages": [{"role": "user", "content": parts}, ANSWERED]}).messages[0]["content"] == "one\ntwo\nthree"


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}])
def test_turns_that_say_so_are_not_learned(mark: dict[str, Any]) -> None:
    conversation = read_conversation({"messages": [ASKED, {**ANSWERED, **mark}, ASKED, ANSWERED]})
    assert conversation.learned == [False, False, False, True]
    assert conversation.messages[1] == ANSWERED


@pytest.mark.parametrize(
    "row",
    [{"tools": [WEATHER]}, {"tools": json.dumps([WEATHER])}, {"functions": [WEATHER["function"]]}, {"tools": None, "functions": "[]"}],
)
def test_tools_come_as_a_list_or_as_json(row: dict[str, Any]) -> None:
    tools = read_conversation({"messages": TWO, **row}).tools
    assert tools == (None if row.get("functions") == "[]" else [WEATHER])


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "assistant", "function_call": {"name": "f", "arguments": {"a": 1}}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
    ],
)
def test_calls_are_written_in_one_way(message: dict[str, Any]) -> None:
    conversation = read_conversation({"messages": [ASKED, message]})
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert conversation.messages[1] == {"role": "assistant", "content": None, "tool_calls": [call]}
    assert conversation.learned[1]


def test_options_of_the_template_come_along() -> None:
    assert read_conversation({"messages": TWO, "chat_template_kwargs": {"enable_thinking": False}}).options == {"enable_thinking": False}
    for reserved in ({"tokenize": True}, {"messages": []}):
        with pytest.raises(ValueError, match="chat_template_kwargs"):
            read_conversation({"messages": TWO, "chat_template_kwargs": reserved})


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": [ASKED, {"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}]}, r"not text \(image_url\)"),
        ({"messages": [ASKED, {"role": "assistant", "content": {"text": "x"}}]}, "content of a message is an object"),
        ({"messages": [ASKED, {"role": "assistant", "content": 42}]}, "content of a message is a number"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "a message without content"),
        ({"messages": [{"role": "user", "content": None}, ANSWERED]}, "a message without content"),
        ({"messages": [ASKED, {**ANSWERED, "weight": 0.5}]}, "a weight other than 0 and 1"),
        ({"messages": ["hello"]}, "a message without a role"),
        ({"messages": "not json"}, "'messages' is text, but not JSON"),
        ({"messages": TWO, "tools": "["}, "'tools' is text, but not JSON"),
        ({"messages": TWO, "tools": {"a": 1}}, "'tools' is not a list"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "a function_call without a name"),
        ({"instruction": "x", "output": "y", "history": "x"}, "'history' is text"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "'history' is not a list of pairs"),
        ({"prompt": "a", "chosen": "b"}, "of their columns it has only prompt"),
        ({"prompt": "a", "completion": 7}, "a message without a role: 7"),
    ],
)
def test_rows_that_cannot_be_read_say_why(row: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_conversation(row)
