"""Where a template puts what the assistant says, and what it leaves out."""

import copy
from collections import Counter
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from decoct.trainer.data.conversations import NothingToLearnError, read_conversation
from decoct.trainer.data.rendering import samples_of

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# the prompt opens a thought that the stored turn has not; thoughts of stored turns are cut
OPENS_THINK = (
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}<A>{{ m.content.split('</think>')[-1] }}<E>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
# an empty thought in the last turn alone, and none in earlier ones
QWEN = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.index0 > ns.last %}<think></think>{% endif %}"
    "{{ m.content }}<E>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }};{% endfor %}]{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}<E>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": {"a": 1}}}


@pytest.fixture
def learned(tokenizer: PreTrainedTokenizerBase) -> Any:
    """(template, messages) to what is learned of each sample, and what was noted."""

    def look(template: str, messages: list[dict[str, Any]], **row: Any) -> tuple[list[list[str]], Counter[str]]:
        own = copy.deepcopy(tokenizer)
        own.chat_template = template
        notes: Counter[str] = Counter()
        samples = samples_of(read_conversation({"messages": messages, **row}), own, notes, everything=False)
        return [[sample.text[begin:end] for begin, end in sample.spans] for sample in samples], notes

    return look


def test_a_prompt_that_opens_a_thought_ends_where_the_stored_turn_goes_its_own_way(learned: Any) -> None:
    assert learned(OPENS_THINK, [user("2+2"), says("4"), user("3+3"), says("6")]) == ([["4<E>", "6<E>"]], Counter())
    assert learned(OPENS_THINK, [user("2+2"), says("<b>4</b>")])[0] == [["<b>4</b><E>"]], "shares its first letter with <think>"
    spans, notes = learned(OPENS_THINK, [user("2+2"), says("<think>sum</think>4")])
    assert spans == [["4<E>"]]
    assert notes == {"turns of which the chat template leaves something out": 1}


def test_turns_that_are_rewritten_later_get_samples_that_end_with_them(learned: Any) -> None:
    spans, _ = learned(QWEN, [user("1"), says("one"), user("2"), says("two"), user("3"), says("three")])
    assert spans == [["<think></think>three<E>"], ["<think></think>two<E>"], ["<think></think>one<E>"]]
    assert learned(QWEN, [user("1"), says("one")])[0] == [["<think></think>one<E>"]]
    # two turns behind one question stay as they are: one sample
    assert learned(QWEN, [user("1"), says("one"), says("more")])[0] == [["<think></think>one<E>", "<think></think>more<E>"]]


@pytest.mark.parametrize("before", [[], [{"role": "system", "content": "be kind"}]])
def test_a_conversation_may_begin_with_the_assistant(learned: Any, before: list[dict[str, Any]]) -> None:
    spans, _ = learned(CHATML, [*before, says("welcome"), user("hi"), says("hello")])
    assert spans == [["welcome<|im_end|>\n", "hello<|im_end|>\n"]]


def test_a_template_that_shows_no_beginning_is_refused(learned: Any) -> None:
    with pytest.raises(ValueError, match="does not show where a turn of the assistant begins"):
        learned("{% for m in messages %}{{ m.content | upper }}{% endfor %}", [says("welcome")])


def test_turns_of_no_weight_are_passed_over_and_counted(learned: Any) -> None:
    spans, notes = learned(CHATML, [user("1"), says("wrong", weight=0), user("2"), says("right")])
    assert spans == [["right<|im_end|>\n"]]
    assert notes == {"turns of the assistant that are marked as not to be learned (weight 0)": 1}
    with pytest.raises(NothingToLearnError):
        learned(CHATML, [user("1"), says("wrong", weight=0)])


def test_tools_reach_the_template_and_are_counted_when_it_leaves_them_out(learned: Any) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    talk = [user("sun?"), says("", tool_calls=[call("weather")])]
    assert learned(WITH_TOOLS, talk, tools=[tool]) == ([['weather({"a": 1})<E>']], Counter())
    _, notes = learned(CHATML, [user("sun?"), says("yes")], tools=[tool])
    assert notes == {"conversations whose tools the chat template leaves out": 1}


def test_a_turn_that_the_template_does_not_show_is_not_learned_as_an_empty_one(learned: Any) -> None:
    with pytest.raises(ValueError, match="does not show the tool calls"):
        learned(CHATML, [user("sun?"), says("", tool_calls=[call("weather")])])
    of_parts = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    with pytest.raises(ValueError, match="does not show what the assistant says"):
        learned(of_parts, [user("sun?"), says("yes")])


def test_turns_without_an_end_are_counted(learned: Any) -> None:
    spans, notes = learned(CHATML.replace("<|im_end|>", ""), [user("sun?"), says("yes")])
    assert spans == [["yes\n"]]
    assert notes == {"turns after which the chat template adds nothing, so that their end is not learned": 1}


def test_a_turn_that_the_template_does_not_render_as_the_last_is_context(learned: Any) -> None:
    asks_first = "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}{{ raise_exception('no user') }}{% endif %}"
    spans, notes = learned(asks_first + CHATML, [says("welcome"), user("hi"), says("hello")])
    assert spans == [["hello<|im_end|>\n"]]
    assert notes == {"turns of the assistant that the chat template does not render as the last, which are not learned": 1}
    with pytest.raises(ValueError, match="refuses it: no user"):
        learned(asks_first + CHATML, [says("welcome")])


def test_missing_content_beside_calls_is_not_printed_as_none(learned: Any) -> None:
    assert learned(WITH_TOOLS, [user("None?"), says(None, tool_calls=[call("f")])])[0] == [['f({"a": 1})<E>']]
    # one that adds to the content is given a text
    adds = WITH_TOOLS.replace("{{ m.content }}", "{{ m.content + '!' }}")
    assert learned(adds, [user("q"), says(None, tool_calls=[call("f")])])[0] == [['!f({"a": 1})<E>']]


def test_reasoning_that_the_template_leaves_out_is_counted(learned: Any) -> None:
    _, notes = learned(CHATML, [user("2+2"), says("4", reasoning_content="a sum")])
    assert notes == {"turns whose reasoning the chat template leaves out": 1}


@pytest.mark.parametrize(
    "template", ["{{ messages[0].nothing.more }}", "{{ 1 / 0 }}", "{{ messages['x'] + 1 }}", "{{ raise_exception('no') }}"]
)
def test_whatever_goes_wrong_in_a_template_is_a_reason(learned: Any, template: str) -> None:
    with pytest.raises(ValueError, match="the chat template refuses it"):
        learned(template, [user("x"), says("y")])
