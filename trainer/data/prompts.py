"""Prompts of samples: beginnings of the text, taken from training windows.

Of text, a window is cut into as many parts as it holds samples. The prompt of a part is the beginning of the first document that begins
in it, or where none begins its own first tokens. Of conversations, the prompt is what stands before the assistant's first answer.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ...losses.shift import MASKED
from ...models.common.errors import UserError
from ...models.generation import control_token_of
from ..settings_samples import SamplesSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "decoct0answer0decoct"
"""Stands for an answer while the template is taken apart; letters and digits, so that no template escapes it."""


def prompts_of(window: Mapping[str, Tensor], settings: SamplesSettings, ends: Collection[int], *, chat: bool) -> list[list[int]]:
    """The prompts for which a window has room, none empty; each fits into the window together with its completion.

    Args:
        window: A training window (``Windows``).
        settings: Length of prompts and completions.
        ends: Ids that end a text, with which no prompt ends.
        chat: Whether the window holds conversations.
    """
    ids = window["input_ids"].tolist()
    length = int(window["attention_mask"].sum())
    # windows that are not packed hold one document
    positions = window["position_ids"].tolist() if "position_ids" in window else [1] * len(ids)
    starts = [0, *(at for at in range(1, length) if positions[at] == 0)]
    found: list[list[int]] = []
    if chat:
        learned = (window["labels"] != MASKED).tolist()
        room = len(ids)
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            answer = next((at for at in range(start, stop) if learned[at]), start)
            needed = answer - start + settings.max_new_tokens
            # a single token is no prompt: the window begins inside an answer
            if answer - start < 2 or needed > room:
                continue
            found.append(ids[start:answer])
            room -= needed
        return found
    count = settings.per_window(len(ids), packed="position_ids" in window)
    part = len(ids) // count
    for begin in range(0, part * count, part):
        start = next((at for at in starts if begin <= at < begin + part), begin)
        stop = next((at for at in starts if at > start), length)
        prompt = ids[start : min(start + settings.prompts, stop)]
        while prompt and prompt[-1] in ends:
            prompt.pop()
        if prompt:
            found.append(prompt)
    return found


def answer_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The control token that the chat template puts behind an answer; None if it puts none, or there is no template."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    _, mark, after = str(tokenizer.apply_chat_template(turns, tokenize=False)).partition(_MARK)
    return control_token_of(tokenizer, after) if mark else None


def check_ends(ends: Collection[int], who: str) -> None:
    """Refuses a model without a token that ends a text.

    Raises:
        UserError: ``ends`` is empty; the message names the model as ``who``.
    """
    if not ends:
        raise UserError(
            f"samples: {who} has no token that ends a text (eos_token of its tokenizer, eos_token_id of its generation_config.json), so "
            "every completion would be cut; add one to the model's files, or train on the given text (leave samples out)"
        )
