"""Reads rows of every usual shape into one form: messages, the tools they may call, and which turns are to be learned.

    messages                        [{role, content, tool_calls, weight, ...}], also as JSON text
    conversations                   the same, or ShareGPT's [{from, value}]
    prompt, completion              texts, or lists of messages
    instruction, (input,) output    Alpaca's, with system and history
    question, answer; prompt, response

and in addition ``tools`` (or ``functions``), ``system`` and ``chat_template_kwargs``.
"""

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

SHAPES = ("'messages'", "'conversations'", "'prompt' and 'completion'", "'instruction' and 'output'", "'question' and 'answer'")
"""The shapes of rows, in words for messages."""
_LISTS = ("messages", "conversations", "conversation")
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"), ("question", "answer"))
COLUMNS = (
    *("messages", "prompt", "completion"),
    *("conversations", "conversation", "instruction", "input", "output", "history", "question", "answer", "response"),
    *("system", "tools", "functions", "chat_template_kwargs"),
)
"""Columns that are read; all others are ignored."""
_ROLES = {
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
"""Roles by other names; all other roles are passed to the template unchanged."""
_TEXT_PARTS = ("text", "input_text", "output_text")
# keys that are read here; all other fields of a message go to the template unchanged
_NO_FIELDS = ("role", "from", "content", "value", "weight", "train", "loss", "function_call")
# arguments of apply_chat_template: a row must not change how it is called
_RESERVED = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "bos_token", "eos_token"),
}
_NAMES = {dict: "an object", int: "a number", float: "a number", bool: "a truth value"}


class NothingToLearnError(ValueError):
    """A valid conversation without a turn that is to be learned."""


@dataclass(frozen=True)
class Conversation:
    """The input of a chat template."""

    messages: list[dict[str, Any]]
    """``role``, ``content`` (text, or None with tool calls) and the row's other fields, without nulls."""
    learned: list[bool]
    """Per message, whether it is a turn of the assistant that is to be learned."""
    tools: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Further variables of the template (``chat_template_kwargs``)."""

    @property
    def strings(self) -> list[str]:
        """Every text in it."""
        found: list[str] = []
        _collect([self.messages, self.tools, self.options], found)
        return found


def is_conversation(columns: Collection[str]) -> bool:
    """Whether columns of these names hold conversations."""
    return any(name in columns for name in _LISTS) or any(first in columns and second in columns for first, second in _PAIRS)


def read_conversation(row: Mapping[str, Any], *, arguments: Literal["object", "text"] = "object") -> Conversation:
    """Reads the conversation of a row.

    Args:
        row: The row.
        arguments: 'object' turns arguments of tool calls from JSON text into objects, as servers pass them to templates; 'text' does the
            opposite.

    Raises:
        ValueError: the row has no conversation, or one with content other than text.
    """
    given = _messages(row)
    messages = [_message(each, arguments) for each in given]
    # some data sets keep the system prompt in a column of its own
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        # kept in step with ``messages``, because zip pairs them below
        given = [{"role": "system"}, *given]
    learned = [message["role"] == "assistant" and _is_learned(raw) for message, raw in zip(messages, given)]
    options = _json(row.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if not isinstance(options, dict) or _RESERVED & options.keys():
        raise ValueError("chat_template_kwargs is not an object, or sets an argument of apply_chat_template")
    return Conversation(messages, learned, _tools(row), options)


def _messages(row: Mapping[str, Any]) -> list[Any]:
    for column in _LISTS:
        messages = _json(row.get(column), column)
        if messages is None:
            continue
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"'{column}' is not a list of messages")
        return messages
    # in the order of the list: a row that has several pairs is read by the first
    for first, second in _PAIRS:
        if row.get(first) is not None and row.get(second) is not None:
            return [*_history(row.get("history")), *_turns(_asked(row, first), "user"), *_turns(row[second], "assistant")]
    there = [name for name in row if name in COLUMNS and row[name] is not None]
    raise ValueError(f"none of {', '.join(SHAPES)}" + (f"; of their columns it has only {', '.join(there)}" if there else ""))


def _asked(row: Mapping[str, Any], column: str) -> Any:
    """The user's turn; Alpaca's input is appended to the instruction."""
    more = row.get("input") if column == "instruction" else None
    return f"{row[column]}\n{more}" if isinstance(row[column], str) and isinstance(more, str) and more.strip() else row[column]


def _history(history: Any) -> list[Any]:
    """Earlier turns as pairs of texts."""
    pairs = _json(history, "history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError("'history' is not a list of pairs")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]


def _turns(value: Any, role: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return value if isinstance(value, list) else [value]


def _json(value: Any, column: str) -> Any:
    """Parses a value that may be stored as JSON text, as in tables without nested columns."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"'{column}' is text, but not JSON") from None


def _message(message: Any, arguments: str) -> dict[str, Any]:
    role = message.get("role", message.get("from")) if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise ValueError(f"a message without a role: {str(message)[:80]}")
    # unknown roles stay as they are: the template decides about them
    name = _ROLES.get(role.strip().lower(), role)
    # content may be null on purpose, next to tool calls, so presence decides and not truth
    content = _text(message["content"] if "content" in message else message.get("value"))
    rest = {key: value for key, value in message.items() if key not in _NO_FIELDS and value is not None}
    # ShareGPT keeps the call in the content, which is then no text to show
    if calls := _calls(message, role, content):
        rest["tool_calls"], content = calls, None if content is None or role.lower() == "function_call" else content
    if "tool_calls" in rest:
        rest["tool_calls"] = _with_arguments(rest["tool_calls"], arguments)
    # a turn may consist of tool calls or reasoning alone
    if content is None and not (rest.get("tool_calls") or rest.get("reasoning_content") or rest.get("reasoning")):
        raise ValueError("a message without content")
    return {"role": name, "content": content, **rest}


def _text(content: Any) -> str | None:
    """The text of a message; a list of parts is joined by line ends, as in vLLM and llama.cpp."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"the content of a message is {_NAMES.get(type(content), 'of another type')}, not text")
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else None
            raise ValueError(f"a part of a message is not text ({kind if isinstance(kind, str) else 'without a type'})")
        texts.append(text)
    return "\n".join(texts)


def _calls(message: Mapping[str, Any], role: str, content: str | None) -> list[dict[str, Any]]:
    """Tool calls in older forms: OpenAI's function_call, or ShareGPT's turn of that name."""
    calls: Any = message.get("function_call")
    if role.strip().lower() == "function_call":
        calls = _json(content, "function_call")
    if calls is None:
        return []
    # several calls in one turn are a list
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ValueError("a function_call without a name")
    return [{"type": "function", "function": call} for call in calls]


def _with_arguments(calls: Any, form: str) -> Any:
    if not isinstance(calls, list):
        return calls
    changed: list[Any] = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and (arguments := function.get("arguments")) is not None:
            # arguments that are not JSON stay as they are: a template may still print them
            with suppress(ValueError, RecursionError, TypeError):
                if isinstance(arguments, str) == (form == "object"):
                    arguments = json.loads(arguments) if form == "object" else json.dumps(arguments, ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": arguments}}
        changed.append(call)
    return changed


def _is_learned(message: Mapping[str, Any]) -> bool:
    """False for turns with ``weight: 0`` (OpenAI), ``train: false`` or ``loss: false``."""
    weight = message.get("weight")
    # OpenAI's format has only 0 and 1, and the losses have no weight per turn
    if weight not in (None, 0, 1):
        raise ValueError("a weight other than 0 and 1")
    return weight != 0 and message.get("train") is not False and message.get("loss") is not False


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = _json(row.get("tools"), "tools")
    if tools is None:
        functions = _json(row.get("functions"), "functions")
        tools = [{"type": "function", "function": each} for each in functions] if isinstance(functions, list) else functions
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("'tools' is not a list of objects")
    return tools or None


def _collect(value: Any, found: list[str]) -> None:
    if isinstance(value, str):
        found.append(value)
    elif isinstance(value, dict):
        for each in value.values():
            _collect(each, found)
    elif isinstance(value, list):
        for each in value:
            _collect(each, found)


def map_strings(value: Any, change: Any, skip: Collection[str] = ()) -> Any:
    """Nested ``value`` with ``change`` applied to every text in it, except under the keys ``skip``."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: each if key in skip else map_strings(each, change, skip) for key, each in value.items()}
    return [map_strings(each, change, skip) for each in value] if isinstance(value, list) else value
