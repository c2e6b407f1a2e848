"""Turns are written by the chat template; a full context forgets the oldest; a refused message changes nothing."""

from pathlib import Path
from typing import Any

import pytest

from decoct.launch.answers.answer import Sampling
from decoct.launch.answers.conversation import Conversation
from decoct.launch.answers.opened import Opened, open_for_answers
from decoct.models.common.errors import UserError

from .conftest import make_model

SHORT = Sampling(max_tokens=4)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the model is given, as text, and the ids that end an answer."""
    import decoct.launch.answers.conversation as conversation

    real, found = conversation.answer, []

    def spy(opened: Opened, ids: list[int], *arguments: Any, **options: Any) -> Any:
        found.append((opened.tokenizer.decode(ids), options["stops"]))
        return real(opened, ids, *arguments, **options)

    monkeypatch.setattr(conversation, "answer", spy)
    return found


def test_the_template_writes_system_prompt_history_and_the_start_of_the_answer(opened: Opened, seen: list[Any]) -> None:
    talk = Conversation(opened, "be brief")
    first = talk.say("hello", SHORT, lambda _: None)
    talk.say("more", SHORT, lambda _: None)
    start = "<|system|>be brief<|end|><|user|>hello<|end|><|assistant|>"
    assert seen[0][0] == start
    assert seen[1][0] == f"{start}{first.text}<|end|><|user|>more<|end|><|assistant|>"
    talk.reset()
    talk.say("hello", SHORT, lambda _: None)
    assert seen[2][0] == start


def test_the_token_that_ends_a_turn_ends_an_answer(opened: Opened, seen: list[Any]) -> None:
    Conversation(opened).say("hello", SHORT, lambda _: None)
    assert seen[0][1] == [opened.tokenizer.convert_tokens_to_ids("<|end|>")]


def test_a_full_context_forgets_the_oldest_turns_and_says_so(opened: Opened, seen: list[Any]) -> None:
    talk, notes = Conversation(opened, "be brief"), []
    for number in range(12):
        talk.say(f"turn {number}", SHORT, lambda _: None, notes.append)
    assert notes
    assert "the oldest 1 of " in notes[0]
    assert seen[-1][0].startswith("<|system|>be brief<|end|><|user|>turn ")
    assert "turn 0" not in seen[-1][0]
    assert "turn 11" in seen[-1][0]


def test_a_message_that_does_not_fit_alone_is_refused_and_forgotten(opened: Opened, seen: list[Any]) -> None:
    talk = Conversation(opened)
    talk.say("hello", SHORT, lambda _: None)
    with pytest.raises(UserError, match="shorten the prompt"):
        talk.say("the cat sat " * 60, SHORT, lambda _: None)
    talk.say("more", SHORT, lambda _: None)
    assert "<|user|>hello" in seen[-1][0]
    assert "sat" not in seen[-1][0]


def test_templates_that_are_missing_or_refuse(tmp_path: Path) -> None:
    bare = open_for_answers(str(make_model(tmp_path / "bare", template=None)))
    with pytest.raises(UserError, match=r"bare has no chat template, .*use `decoct generate`"):
        Conversation(bare)
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}{{ messages[0]['content'] }}"
    picky = open_for_answers(str(make_model(tmp_path / "picky", template=strict)))
    with pytest.raises(UserError, match="refuses the conversation: no system prompts; leave --system out"):
        Conversation(picky, "be brief")
