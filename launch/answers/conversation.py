"""A conversation with a model: its chat template, the turns so far, and what still fits into the context."""

from collections.abc import Callable
from typing import Any

from ...models.common.errors import UserError
from ...models.generation import control_token_of
from ...models.tokenizer.chat_template import check_chat_template
from .answer import Answer, Sampling, answer
from .opened import Opened

_MARK = "decoct-mark"
_TEMPLATE_ERRORS = (TypeError, KeyError, IndexError, AttributeError, ValueError, ArithmeticError, RecursionError)


class Conversation:
    """The turns of a conversation, the system prompt first.

    Raises:
        UserError: the tokenizer has no chat template, or one that does not end or refuses a system prompt.
    """

    def __init__(self, opened: Opened, system: str | None = None) -> None:
        if not opened.tokenizer.chat_template:
            raise UserError(
                f"{opened.name} has no chat template, so it is not known how it writes a conversation; use `decoct generate`, or copy the "
                "chat_template.jinja of the model that it was made from into its folder (`decoct verify FOLDER --accept "
                "chat_template.jinja` records it)"
            )
        # before the template renders anything: it may not end
        check_chat_template(opened.tokenizer)
        self._opened = opened
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []
        self._stops = _turn_ends(opened)
        # a template that refuses the system prompt is told of before the first message
        self._ids([*self._system, {"role": "user", "content": "hello"}])

    def reset(self) -> None:
        """Forget every turn but the system prompt."""
        self._turns = []

    def say(self, message: str, sampling: Sampling, say: Callable[[str], None], note: Callable[[str], None] = lambda _: None) -> Answer:
        """The model's answer to ``message``, which both are remembered. Without room in the context the oldest turns are dropped.

        Args:
            message: What the user says.
            sampling: How to choose tokens, and how many.
            say: Gets the text as it comes.
            note: Gets a line when turns are dropped.

        Raises:
            UserError: the message alone does not fit into the context; the conversation stays as it was.
        """
        turns = [*self._turns, {"role": "user", "content": message}]
        ids = self._ids([*self._system, *turns])
        dropped = 0
        # half of the context at most is kept free for the answer
        while self._opened.context is not None and len(ids) > self._opened.context - min(sampling.max_tokens, self._opened.context // 2):
            # the message itself stays; if it alone is too long, ``answer`` says so
            if len(turns) == 1:
                break
            # turns go in pairs of question and answer
            turns, dropped = turns[2:], dropped + 1
            ids = self._ids([*self._system, *turns])
        made = answer(self._opened, ids, sampling, say=say, stops=self._stops)
        if dropped:
            note(f"the context is full: the oldest {dropped} of {dropped + len(turns) // 2 + 1} turns are forgotten")
        # only now, so that an answer that fails leaves the conversation as it was
        self._turns = [*turns, {"role": "assistant", "content": made.text}]
        return made

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        # the template has written the control tokens itself
        return list(self._opened.tokenizer(_render(self._opened, messages, prompt=True), add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType] - one text gives one list


def _render(opened: Opened, messages: list[dict[str, str]], *, prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text: Any = opened.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    # a template is a program of the model's author, and may raise nearly anything
    except (TemplateError, *_TEMPLATE_ERRORS) as error:
        hint = "; leave --system out" if messages and messages[0]["role"] == "system" else ""
        raise UserError(f"the chat template of {opened.name} refuses the conversation: {error}{hint}") from error
    return text


def _turn_ends(opened: Opened) -> list[int]:
    """The control token that the template puts behind an answer; [] where it puts none."""
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _MARK}]
    after = control_token_of(opened.tokenizer, _render(opened, turns, prompt=False).rpartition(_MARK)[2])
    return [] if after is None else [after]
