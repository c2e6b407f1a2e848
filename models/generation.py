"""Generating text with transformers' ``generate``: what ends a text, which ids are tokens, and whose settings count, in one place."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase


def end_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", more: Iterable[int] = ()) -> list[int]:
    """Ids that end a text, ascending: those of the tokenizer, of the model's generation settings, and ``more``."""
    # a number, a list, or None
    named: Any = getattr(model.generation_config, "eos_token_id", None)
    several = named if isinstance(named, list | tuple) else [named]
    return sorted({token for token in (tokenizer.eos_token_id, *several, *more) if isinstance(token, int)})


def up_to_end(ids: Sequence[int], ends: Iterable[int]) -> tuple[list[int], bool]:
    """(the ids before the first that ends a text, whether there is one). Behind it is padding."""
    known = frozenset(ends)
    place = next((at for at, token in enumerate(ids) if token in known), None)
    return (list(ids), False) if place is None else (list(ids[:place]), True)


def control_token_of(tokenizer: "PreTrainedTokenizerBase", after: str) -> int | None:
    """The control token that a template puts behind a message, which models learn to end with; None where it puts none.

    Args:
        tokenizer: Has the template.
        after: The rendered text behind the message.
    """
    # lstrip: some templates put a line end before the control token
    ids: Any = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"] if after.strip() else []
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids[0] if ids and ids[0] in control else None


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) [B, S] int64 of prompts that end at the same place, so that each is continued there."""
    # the right ends are aligned, so all prompts are continued at the same position
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for at, prompt in enumerate(prompts):
        ids[at, width - len(prompt) :] = torch.tensor(prompt)
        mask[at, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def decoded(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of ids, without control tokens and with the spaces that the tokens have."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@contextmanager
def only_these_settings(model: Any, settings: "GenerationConfig") -> Iterator[None]:
    """Inside the block the model has no generation settings of its own; they would fill what ``settings`` leaves open, like penalties."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def real_tokens(v_eff: int) -> "LogitsProcessorList":
    """Keeps ``generate`` from the rows of a padded head, whose ids (from ``v_eff`` on) are no tokens."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class RealTokens(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            # in place: the logits are this step's own
            scores[:, v_eff:] = -math.inf
            return scores

    return LogitsProcessorList([RealTokens()])
