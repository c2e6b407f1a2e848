"""Renders conversations by the tokenizer's chat template and finds the place of every turn that is to be learned.

A turn is learned as it is rendered when it is the last turn, because a server generates it in that place. Most templates render earlier
turns the same way afterwards, and one sample then holds all turns. Templates of reasoning models do not (Qwen3 drops the thoughts of
earlier turns): a turn that is rendered differently afterwards gets its own sample, which ends with it.
"""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .conversations import Conversation, NothingToLearnError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# a template is a program with the row as its input, and may fail in any of these ways
_TEMPLATE_ERRORS = (TypeError, KeyError, IndexError, AttributeError, ValueError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Sample:
    """A text and its learned parts, as (begin, end) in characters."""

    text: str
    spans: list[tuple[int, int]]


def samples_of(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", notes: Counter[str], *, everything: bool) -> list[Sample]:
    """The samples of a conversation, the longest first; each turn is learned in one of them.

    Args:
        conversation: The conversation.
        tokenizer: Has the chat template.
        notes: Counts what the template leaves out.
        everything: Learn prompts too, in one sample.

    Raises:
        ValueError: the template refuses the conversation, or it has no turn of the assistant.
        NothingToLearnError: all turns of the assistant have weight 0.
    """
    messages = _with_content(conversation, tokenizer)
    turns = [turn for turn, learned in enumerate(conversation.learned) if learned]
    passed = sum(message["role"] == "assistant" for message in messages) - len(turns)
    if not turns:
        if passed:
            raise NothingToLearnError("no turn of the assistant that is to be learned (weight 0)")
        raise ValueError("no turn of the assistant")
    # every turn in its final form: the text of the first sample
    whole = _render(messages, conversation, tokenizer)
    _note_tools(conversation, whole, notes)
    if everything:
        return [Sample(whole, [(0, len(whole))])]
    if passed:
        notes["turns of the assistant that are marked as not to be learned (weight 0)"] += passed
    places: dict[int, tuple[str, int]] = {}
    for turn in turns:
        is_last = turn + 1 == len(messages)
        after = whole if is_last else _try_render(messages[: turn + 1], conversation, tokenizer, prompt=False)
        # some templates refuse a conversation that ends in the middle, for example after a tool call
        if after is None:
            notes["turns of the assistant that the chat template does not render as the last, which are not learned"] += 1
            continue
        begin = _begin_of_turn(after, messages, turn, conversation, tokenizer)
        _check_turn(messages[turn], after, begin, notes)
        places[turn] = after, begin
    if not places:
        raise ValueError("the chat template renders no turn of the assistant as the last")
    return _gather(whole, places)


def _gather(whole: str, places: dict[int, tuple[str, int]]) -> list[Sample]:
    """The fewest samples in which every turn appears as it was rendered as the last turn."""
    samples: list[Sample] = []
    # begins with the whole conversation, which usually holds every turn
    text, left = whole, dict(places)
    while left:
        # a turn belongs to this text if the text begins with the conversation as rendered up to that turn
        own = {turn: (begin, len(after)) for turn, (after, begin) in left.items() if text.startswith(after)}
        if own:
            samples.append(Sample(text, list(own.values())))
        left = {turn: place for turn, place in left.items() if turn not in own}
        if left:
            # the latest turn that is left: its text holds the most of the turns before it
            text = left[max(left)][0]
    return samples


def _begin_of_turn(
    after: str, messages: list[dict[str, Any]], turn: int, conversation: Conversation, tokenizer: "PreTrainedTokenizerBase"
) -> int:
    """The place in ``after`` (the conversation up to and including ``turn``) at which the assistant's part of the turn begins."""
    before = _try_render(messages[:turn], conversation, tokenizer, prompt=True)
    # the prompt of a server for this turn: what follows it is what the model would generate
    if before is not None and after.startswith(before):
        return len(before)
    # otherwise by the content of the turn itself
    content = (messages[turn]["content"] or "").strip()
    # the last occurrence, because an earlier turn may contain the same words
    at = after.rfind(content) if content else -1
    if before is not None:
        # the prompt may end with text that is not in the stored turn, such as a <think> that the template opens
        common = _common_prefix(before, after)
        bare = _try_render(messages[:turn], conversation, tokenizer, prompt=False)
        if bare is not None and after.startswith(bare) and common >= len(bare):
            return min(common, at) if at >= len(bare) else common
    if at < 0:
        raise ValueError("the chat template does not show where a turn of the assistant begins")
    return at


def _common_prefix(first: str, second: str) -> int:
    """Length of the longest common prefix of two texts."""
    pairs = zip(first, second)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _with_content(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase") -> list[dict[str, Any]]:
    """The messages; missing content of messages with tool calls becomes '' if the template would print it as 'None'."""
    messages = conversation.messages
    if all(message["content"] is not None for message in messages):
        return messages
    filled = [{**message, "content": message["content"] or ""} for message in messages]
    text = _try_render(messages, conversation, tokenizer, prompt=False)
    # the messages may contain the word themselves
    spelled = sum(string.count("None") for string in conversation.strings)
    return filled if text is None or text.count("None") > spelled else messages


def _render(
    messages: list[dict[str, Any]], conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", *, prompt: bool = False
) -> str:
    from jinja2 import TemplateError

    try:
        text: Any = tokenizer.apply_chat_template(
            messages, tools=conversation.tools, tokenize=False, add_generation_prompt=prompt, **conversation.options
        )
    except (TemplateError, *_TEMPLATE_ERRORS) as error:
        raise ValueError(f"the chat template refuses it: {error}") from error
    return text


def _try_render(
    messages: list[dict[str, Any]], conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", *, prompt: bool
) -> str | None:
    """``_render``, but None if the template refuses the messages or there are none."""
    try:
        return _render(messages, conversation, tokenizer, prompt=prompt) if messages else None
    except ValueError:
        return None


def _note_tools(conversation: Conversation, text: str, notes: Counter[str]) -> None:
    functions = [tool.get("function", tool) for tool in conversation.tools or ()]
    names = [function["name"] for function in functions if isinstance(function, dict) and isinstance(function.get("name"), str)]
    if any(name not in text for name in names):
        notes["conversations whose tools the chat template leaves out"] += 1


def _check_turn(message: dict[str, Any], after: str, begin: int, notes: Counter[str]) -> None:
    """Counts what the template leaves out of a turn; raises ValueError if it leaves out all of it."""
    content = (message["content"] or "").strip()
    # from before the turn: a prompt that opens a thought already contains the beginning of the content
    rendered = after[max(0, begin - len(content)) :]
    names = [name for call in message.get("tool_calls") or () if (name := _called(call))]
    if not all(name in rendered for name in names):
        raise ValueError("the chat template does not show the tool calls")
    # a template may drop thoughts, but not the answer after them
    words = content.rpartition("</think>")[2].split()
    if words and not names and words[-1] not in rendered:
        raise ValueError("the chat template does not show what the assistant says")
    # compared without white space, because templates trim and break lines
    if "".join(content.split()) not in "".join(rendered.split()):
        notes["turns of which the chat template leaves something out"] += 1
    elif content and rendered.rstrip().endswith(content):
        notes["turns after which the chat template adds nothing, so that their end is not learned"] += 1
    for name in ("reasoning_content", "reasoning"):
        thought = message.get(name)
        if isinstance(thought, str) and thought.strip() not in rendered:
            notes["turns whose reasoning the chat template leaves out"] += 1
            return


def _called(call: Any) -> str | None:
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None
