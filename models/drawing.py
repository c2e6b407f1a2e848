"""Many texts at once, drawn token by token from a model's distribution; a text that has ended costs nothing from then on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .common.quiet import quiet_transformers
from .generation import left_padded, only_these_settings, real_tokens, up_to_end

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHRINK_AT = 0.9
"""Share of rows still written below which the others leave the batch: taking rows out copies the whole cache of keys and values."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How texts are drawn."""

    ends: Sequence[int]
    """Ids that end a text."""
    v_eff: int
    """Ids from here on mean no token and are never drawn."""
    max_new_tokens: int
    """Longest text, its end token not counted."""
    temperature: float = 1.0
    """Divides the logits."""
    top_p: float = 1.0
    """Each token is drawn from the likeliest tokens that hold this share of the probability."""


def drawn_texts(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    drawing: Drawing,
    seed: int,
    on_step: Callable[[int], None] = lambda rows: None,
) -> list[tuple[list[int], bool]]:
    """(own ids without the end token, whether the model ended by itself) for each prompt; see ``drawn_ids``.

    Args:
        model, prompts, drawing, on_step: As for ``drawn_ids``.
        seed: Decides the random numbers of all texts.
    """
    generator = torch.Generator().manual_seed(seed)
    # fp64: as fine as the cumulated probabilities; on the CPU, so that the numbers are the same for every device
    chances = torch.rand(len(prompts), drawing.max_new_tokens, generator=generator, dtype=torch.float64)
    return [up_to_end(ids, drawing.ends) for ids in drawn_ids(model, prompts, drawing, chances, on_step)]


def own_chances(seeds: Sequence[int], count: int) -> Tensor:
    """fp64 [N, count] in [0, 1): random numbers of which each row depends on its own seed alone, whatever rows are beside it."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, count, dtype=torch.float64)


def drawn_ids(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    drawing: Drawing,
    chances: Tensor,
    on_step: Callable[[int], None] = lambda rows: None,
) -> list[list[int]]:
    """The own ids of each prompt's text: up to its first end token, which is the last of them, or as many as allowed without one.

    Every row has random numbers of its own, so its text does not depend on which other rows have ended. transformers prepares the inputs
    and the cache; the loop is here because theirs computes rows that have ended until the last one does.

    Args:
        model: In eval mode, on its device.
        prompts: Ids of each prompt, none empty.
        drawing: How to draw.
        chances: fp64 [N, max_new_tokens] in [0, 1): the random numbers of each text; those of the process are left alone.
        on_step: Called after each step with the number of rows that it wrote a token of.
    """
    from transformers import GenerationConfig

    if not prompts:
        return []
    # the value of the padding does not matter: it is masked
    pad = drawing.ends[0] if drawing.ends else 0
    ids, mask = left_padded(prompts, pad, model.device)
    config = GenerationConfig(
        do_sample=True,
        temperature=drawing.temperature,
        top_p=drawing.top_p,
        # transformers would otherwise keep the 50 likeliest tokens alone
        top_k=0,
        max_new_tokens=drawing.max_new_tokens,
        eos_token_id=list(drawing.ends) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    loop = _Loop(chances.to(model.device), drawing, on_step)
    anything: Any = model
    with only_these_settings(model, config), quiet_transformers(), torch.no_grad():
        anything.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=real_tokens(drawing.v_eff), custom_generate=loop
        )
    return [row[: len(up_to_end(row, drawing.ends)[0]) + 1] for row in loop.texts]


class _Loop:
    """The decoding loop that ``generate`` runs in place of its own (its ``custom_generate``)."""

    def __init__(self, chances: Tensor, drawing: Drawing, on_step: Callable[[int], None]) -> None:
        self._chances, self._drawing, self._on_step = chances, drawing, on_step
        self.texts: list[list[int]] = [[] for _ in range(len(chances))]

    def __call__(self, model: Any, input_ids: Tensor, logits_processor: Any, **given: Any) -> Tensor:
        """Draws until every row has ended or is as long as allowed; ``given`` are the model's inputs beside the ids."""
        # what generate hands over for its own loop; the rest are inputs of the model
        state = {
            name: value
            for name, value in given.items()
            if name not in ("stopping_criteria", "generation_config", "synced_gpus", "streamer")
        }
        ends = torch.tensor(self._drawing.ends, dtype=torch.int64, device=input_ids.device)
        # rows: which text each row of the batch belongs to, since finished ones leave the batch
        rows = torch.arange(len(self.texts), device=input_ids.device)
        outputs: Any = model._prefill(input_ids, given["generation_config"], state, is_first_iteration=True)
        for step in range(self._drawing.max_new_tokens):
            if step:
                inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **state)
                outputs = model(**inputs, return_dict=True)
            state = model._update_model_kwargs_for_generation(outputs, state, is_encoder_decoder=False)
            # a copy, because the processor writes -inf into it
            logits = outputs.logits[:, -1].to(torch.float32, copy=True)
            # the cache stays in the state alone, so that the rows taken out of it are freed
            outputs = None
            tokens = drawn(logits_processor(input_ids, logits), self._chances[rows, step])
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            for row, token in zip(rows.tolist(), tokens.tolist()):
                # a row that has ended and still is in the batch writes on behind its end, which nobody reads
                self.texts[row].append(token)
            # all tokens of the text so far: a row that ended earlier may still be in the batch
            going = ~torch.isin(input_ids[:, -step - 1 :], ends).any(1)
            left = int(going.sum())
            self._on_step(left)
            if not left:
                break
            if left < _SHRINK_AT * len(rows) and _can_shrink(state):
                kept = going.nonzero()[:, 0]
                rows, input_ids, state = rows[kept], input_ids[kept], _rows_of(state, kept, len(going))
        return input_ids


def drawn(logits: Tensor, chances: Tensor) -> Tensor:
    """Token ids [B] int64 at which the cumulated probabilities pass ``chances``: inverse transform sampling.

    Args:
        logits: [B, V] fp32; -inf is never drawn.
        chances: [B] fp64 in [0, 1).
    """
    # fp64: sums over 100,000 tokens in fp32 would lose the small probabilities
    sums = torch.softmax(logits.double(), dim=-1).cumsum(-1)
    # sums end a rounding error beside 1; the last one stands for all that is left
    places = torch.searchsorted(sums, (chances * sums[:, -1])[:, None], right=True)[:, 0]
    return places.clamp_(max=logits.shape[-1] - 1)


def _can_shrink(state: dict[str, Any]) -> bool:
    """Whether rows can be taken out of the cache: it is one of keys and values; states of recurrent layers have forms of their own."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = state.get("past_key_values")
    return isinstance(cache, DynamicCache) and all(isinstance(layer, DynamicLayer) for layer in cache.layers)


def _rows_of(state: dict[str, Any], kept: Tensor, rows: int) -> dict[str, Any]:
    """The model's inputs for the rows ``kept``."""
    state["past_key_values"].batch_select_indices(kept)

    def chosen(value: Any) -> Any:
        # positions may be shared by all rows: [1, S]
        return value[kept] if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows else value

    return {name: chosen(value) for name, value in state.items()}
