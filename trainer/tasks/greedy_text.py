"""Greedy generation with a cache of keys and values, up to stop strings."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...models.eval_mode import eval_mode
from ...models.generation import decoded, end_ids, left_padded, only_these_settings, up_to_end
from ..evaluation.figures import exact_products

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARGIN = 8
"""Tokens that are decoded beyond the length of the longest stop string: a token may begin before it, or hold part of a character."""


def generate(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[list[int]],
    until: Sequence[str],
    max_tokens: int,
    pad: int,
    device: torch.device,
) -> list[str]:
    """Greedy text after each prompt, without the stop string that ended it.

    Args:
        model: Causal language model of transformers on ``device``. Its own ``generation_config`` gives end tokens, and nothing else.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt, at least one; they are padded on the left.
        until: Strings that end a text.
        max_tokens: Most new tokens of a text.
        pad: Id of padding.
        device: Device of the model.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    ids, mask = left_padded(prompts, pad, device)
    width = ids.shape[1]
    ends = end_ids(model, tokenizer)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=max_tokens, pad_token_id=pad, eos_token_id=ends or None, use_cache=True)
    stops = StoppingCriteriaList([_Stops(tokenizer, until, width)])
    with only_these_settings(model, greedy), torch.no_grad(), eval_mode(model), exact_products(device.type):
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy, stopping_criteria=stops)
    # behind an end token is padding, or what came after a stop string of another row
    return [_cut(decoded(tokenizer, up_to_end(row[width:].tolist(), ends)[0]), until) for row in made]


class _Stops:
    """A stopping criterion of transformers: which rows have a stop string among their new tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", until: Sequence[str], width: int) -> None:
        self._tokenizer, self._until, self._width = tokenizer, until, width
        self._tail = max(map(len, until), default=0) + _MARGIN

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        tails = input_ids[:, max(self._width, input_ids.shape[1] - self._tail) :].tolist()
        done = [any(stop in decoded(self._tokenizer, tail) for stop in self._until) for tail in tails]
        return torch.tensor(done, device=input_ids.device)


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]
