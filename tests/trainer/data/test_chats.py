"""Conversations against what the template itself renders."""

import copy
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from decoct.models.common.cache_folder import cache_dir
from decoct.models.common.errors import UserError
from decoct.trainer.data.chats import ChatEncoder, encode_chat
from decoct.trainer.data.documents import Documents
from decoct.trainer.data.prepared_data import open_prepared, prepare_data
from decoct.trainer.settings import DataSettings

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# drops what the assistant thought in earlier turns, as reasoning models do
FORGETFUL = (
    "{% for m in messages %}<{{ m['role'] }}>{% if loop.last and m['role'] == 'assistant' %}thought {% endif %}"
    "{{ m['content'] }}</{{ m['role'] }}>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one and one?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "quite"},
]


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return own


def learned(samples: list[tuple[list[int], list[bool]]], tokenizer: Any) -> list[str]:
    return [tokenizer.decode([token for token, own in zip(*sample) if own]) for sample in samples]


def said(row: dict[str, Any], tokenizer: Any) -> tuple[str, str]:
    """(whole text, the parts that are predicted) of a row."""
    ids, predicted = encode_chat(row, tokenizer)
    return tokenizer.decode(ids), tokenizer.decode([token for token, own in zip(ids, predicted) if own])


def test_every_turn_of_the_assistant_and_nothing_else_is_predicted(chatty: Any) -> None:
    whole, own = said({"messages": TALK}, chatty)
    assert whole == chatty.apply_chat_template(TALK, tokenize=False)
    assert own == "two</assistant>\nquite</assistant>\n"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "one and one?", "completion": "two"},
        {"prompt": [{"role": "user", "content": "one and one?"}], "completion": [{"role": "assistant", "content": "two"}]},
    ],
)
def test_prompt_and_completion_are_two_turns(chatty: Any, row: dict[str, Any]) -> None:
    assert said(row, chatty) == ("<user>one and one?</user>\n<assistant>two</assistant>\n", "two</assistant>\n")


def test_without_a_template_prompt_and_completion_are_plain_text(tokenizer: Any) -> None:
    whole, own = said({"prompt": "one and one?", "completion": " two"}, tokenizer)
    assert whole == "one and one? two" + tokenizer.eos_token
    assert own.endswith(" two" + tokenizer.eos_token)
    with pytest.raises(UserError, match="needs a tokenizer with a chat template"):
        encode_chat({"messages": TALK}, tokenizer)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({}, "none of 'messages', .*'prompt' and 'completion'"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": "hello"}, "is text, but not JSON"),
        ({"messages": [{"content": "hello"}]}, "without a role"),
        ({"messages": TALK[:2]}, "no turn of the assistant"),
        ({"prompt": "one", "completion": None}, "of their columns it has only prompt"),
    ],
)
def test_rows_that_are_no_conversation_say_why(chatty: Any, row: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        encode_chat(row, chatty)


def test_turns_that_a_template_rewrites_later_are_learned_as_they_were_rendered_last(chatty: Any) -> None:
    """The last turn in the whole conversation, an earlier one in a sample that ends with it: what a server's prompt leads to."""
    chatty.chat_template = FORGETFUL
    samples = ChatEncoder(chatty).encode({"messages": TALK})
    assert [chatty.decode(ids) for ids, _ in samples] == [
        chatty.apply_chat_template(TALK, tokenize=False),
        chatty.apply_chat_template(TALK[:3], tokenize=False),
    ]
    assert learned(samples, chatty) == ["thought quite</assistant>\n", "thought two</assistant>\n"]
    assert said({"messages": TALK[1:3]}, chatty)[1] == "thought two</assistant>\n"


def write_rows(tmp_path: Path, rows: list[Any], kind: str = "jsonl") -> DataSettings:
    tmp_path.mkdir(exist_ok=True)
    file = tmp_path / f"talks.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return DataSettings(files=(str(file),), kind="chat", seq_length=64, eval_tokens=128)


def talks(count: int) -> list[Any]:
    return [
        {"messages": [{"role": "user", "content": f"count to {n}"}, {"role": "assistant", "content": f"{n} " * 9}]} for n in range(count)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("packing", [True, False])
def test_windows_predict_the_assistant_alone(tmp_path: Path, chatty: Any, kind: str, packing: bool) -> None:
    settings = write_rows(tmp_path, talks(60), kind)
    data = prepare_data(DataSettings(**{**vars(settings), "packing": packing}), chatty, cache_dir())
    assert data.samples == {"read": 60, "bad": 0, "first_bad": ""}
    seen = 0
    for index in range(len(data.train)):
        window = data.train[index]
        assert (window["input_ids"] >= 0).all()
        predicted = chatty.decode(window["labels"][window["labels"] != -100])
        assert "user" not in predicted
        assert "count" not in predicted
        seen += int((window["labels"] != -100).sum())
    assert seen > 0
    everything = prepare_data(DataSettings(**{**vars(settings), "packing": packing, "mask_prompts": False}), chatty, cache_dir())
    assert sum(int((everything.train[i]["labels"] != -100).sum()) for i in range(len(everything.train))) > 1.3 * seen


def test_bad_samples_are_left_out_counted_and_told(tmp_path: Path, chatty: Any) -> None:
    rows = talks(60)
    rows[7], rows[9], rows[30] = "{not json", {"messages": TALK[:1]}, {"text": "other"}
    told: list[str] = []
    data = prepare_data(write_rows(tmp_path, rows), chatty, cache_dir(), say=told.append)
    assert data.samples is not None
    assert (data.samples["read"], data.samples["bad"]) == (60, 3)
    assert "talks.jsonl:8" in data.samples["first_bad"]
    assert "3 of 60 conversations were left out" in told[0]
    assert open_prepared(data.path).samples == data.samples


def test_data_that_is_mostly_bad_is_refused(tmp_path: Path, chatty: Any) -> None:
    rows = [*talks(8), *([{"text": "other"}] * 2)]
    with pytest.raises(UserError, match=r"2 of 10 conversations cannot be used; the first: talks\.jsonl:9"):
        prepare_data(write_rows(tmp_path, rows), chatty, cache_dir())
    assert not list((cache_dir() / "tokens").iterdir())


def test_text_files_hold_no_conversations(tmp_path: Path, chatty: Any) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match=r"a\.txt holds no conversations"):
        prepare_data(DataSettings(files=(str(tmp_path / "a.txt"),), kind="chat"), chatty, cache_dir())


def test_conversations_read_as_text_are_told_of_the_key(tmp_path: Path, tokenizer: Any) -> None:
    settings = write_rows(tmp_path, talks(3))
    with pytest.raises(UserError, match=r"set data\.kind: chat"):
        prepare_data(DataSettings(**{**vars(settings), "kind": "text"}), tokenizer, cache_dir())


def test_switches_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="mask_prompts=false has no effect"):
        DataSettings(builtin="python-stdlib", mask_prompts=False)
    with pytest.raises(ValueError, match="builtin text has none"):
        DataSettings(builtin="python-stdlib", kind="chat")


def test_half_an_emoji_is_replaced_and_counted(tmp_path: Path, chatty: Any) -> None:
    rows = [json.dumps(row) for row in talks(60)]
    rows[5] = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "cut \\ud83d"}], "\\ud83d": 1}'
    data = prepare_data(replace(write_rows(tmp_path, rows), eval_tokens=64), chatty, cache_dir())
    assert data.samples == {"read": 60, "bad": 0, "first_bad": ""}
    assert data.left_out["texts with half of a surrogate pair, which became '?'"] == 1
    windows = [each[i]["input_ids"] for each in (data.train, data.evaluation) for i in range(len(each))]
    assert "cut ?</assistant>" in "".join(chatty.decode(ids) for ids in windows)


def test_every_reason_is_counted(tmp_path: Path, chatty: Any) -> None:
    rows = talks(80)
    rows[3], rows[4], rows[5] = "{not json", {"messages": TALK[:1]}, {"messages": TALK[:1]}
    rows[6] = {"messages": [*TALK[:2], {"role": "assistant", "content": "no", "weight": 0}]}
    rows[8] = {"messages": [{"role": "user\x1b[2J", "content": None}]}
    rows[7] = {"messages": [TALK[1], {"role": "assistant", "content": [{"type": "image_url"}]}]}
    data = prepare_data(write_rows(tmp_path, rows), chatty, cache_dir(), say=lambda text: None)
    assert data.samples is not None
    assert (data.samples["read"], data.samples["bad"]) == (80, 5)
    assert {reason: count for reason, count in data.left_out.items() if "conversations" in reason} == {
        "conversations: a row that cannot be read": 1,
        "conversations: no turn of the assistant": 2,
        "conversations: a message without content": 1,
        "conversations: a part of a message is not text (image_url)": 1,
        "conversations of which no turn is to be learned (weight 0)": 1,
    }


def test_samples_of_one_conversation_are_on_one_side(tmp_path: Path, chatty: Any) -> None:
    chatty.chat_template = FORGETFUL
    rows = [{"messages": [{**message, "content": f"{n:03d} {message['content']}"} for message in TALK]} for n in range(60)]
    data = prepare_data(write_rows(tmp_path, rows), chatty, cache_dir())
    assert data.left_out["further samples, of turns that the chat template rewrites later on"] == 60
    held, trained = (
        set(
            re.findall(
                r"(\d{3}) (?:be brief|one and|two|sure|quite)", "".join(chatty.decode(side[i]["input_ids"]) for i in range(len(side)))
            )
        )
        for side in (data.evaluation, data.train)
    )
    assert held
    assert trained
    assert not held & trained


@pytest.mark.parametrize("name", ["talks.json", "talks.csv", "talks.jsonl.gz"])
def test_conversations_come_in_every_kind_of_rows(tmp_path: Path, chatty: Any, name: str) -> None:
    rows = [{"prompt": f"count to {n}", "completion": f"{n} " * 9} for n in range(60)]
    file = tmp_path / name
    if name.endswith(".csv"):
        file.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    elif name.endswith(".gz"):
        file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        file.write_text(json.dumps(rows))
    settings = DataSettings(files=(str(file),), kind="chat", seq_length=64, eval_tokens=128)
    plain = prepare_data(write_rows(tmp_path / "plain", rows), chatty, cache_dir())
    data = prepare_data(settings, chatty, cache_dir())
    assert data.samples == {"read": 60, "bad": 0, "first_bad": ""}
    assert [data.train[i]["input_ids"].tolist() for i in range(len(data.train))] == [
        plain.train[i]["input_ids"].tolist() for i in range(len(plain.train))
    ]


def test_the_cache_tells_ways_to_read_control_tokens_apart(tmp_path: Path, chatty: Any) -> None:
    settings = write_rows(tmp_path, talks(60))
    prints = [
        prepare_data(
            replace(settings, kind=kind, text_field="messages", special_tokens=way), chatty, cache_dir(), documents=documents
        ).fingerprint
        for kind, documents in (("chat", None), ("text", Documents("told", "0" * 64, lambda: [str(row) for row in talks(60)])))
        for way in ("auto", "text", "control")
    ]
    chat_auto, chat_text, chat_control, text_auto, text_text, text_control = prints
    assert chat_auto == chat_text != chat_control
    assert text_auto == text_control != text_text


def test_arguments_are_text_for_templates_that_need_it(chatty: Any) -> None:
    chatty.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{% set f = c.function %}"
        "{{ f.name + '!' + f.arguments }}{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    for arguments in ('{"a": 1}', {"a": 1}):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
        assert said(row, chatty)[1] == 'f!{"a": 1}'
