"""Runs a cut model: tied tensors, number of parameters, generation with a cache, and the forward pass in the shape of its parent."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.common.host_memory import available_bytes
from ...models.family_map import family_of
from ...models.folder.loading import load_model
from ...models.folder.model_folder import RECORD
from ...models.pruning.expand import expand, expandable
from ...models.pruning.kept import Kept
from ...models.pruning.structured import formula
from ...models.sizes import Sizes, sizes_of
from ...models.ties import is_tied
from ..runtimes.reference import chosen_tokens

TOLERANCE = 1e-3
"""Largest difference of logits, relative to the largest one if that is above 1: sums of other lengths round otherwise in fp32."""
_PROMPT, _GENERATED = 8, 16


def computed(path: Path, record: Mapping[str, Any]) -> Iterator[tuple[list[str], str]]:
    """(what is wrong, what was found right) of each check; ``record`` agrees with the config and the shapes of the files.

    Raises:
        UserError: the folder cannot be loaded.
    """
    model = load_model(path, dtype=torch.float32)
    tokens = chosen_tokens(path, None)
    family = family_of(model)
    before = Sizes(**record["parent_shape"])
    kept = Kept.from_record(record["kept"], family, before.layers)
    yield _parameters(model)
    yield _ties(model)
    yield cached(model, tokens[:1])
    if not expandable(family, kept):
        yield [], f"not compared with masks in the parent's shape: the mean of {family.name}'s LayerNorms is over fewer channels"
        return
    grown = formula(family, {name: tuple(value.shape) for name, value in model.named_parameters()}, before)
    needed, free = 4 * grown, available_bytes()
    if free is not None and needed > free:
        yield [], f"not compared with masks in the parent's shape: that needs {needed:,} bytes of memory, and {free:,} are free"
        return
    with torch.inference_mode():
        own = _logits(model, tokens)
        whole = _logits(expand(model, kept, before), tokens)
    far = _difference(whole, own)
    yield (
        [f"in the shape of the parent, with masks from {RECORD}, the model computes other logits (difference {far:.3g})"]
        if not far <= TOLERANCE
        else [],
        f"in the shape of the parent, with masks from {RECORD}, the model computes the same logits (difference {far:.1g})",
    )


def _parameters(model: Any) -> tuple[list[str], str]:
    family = family_of(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    count = sum(parameter.numel() for parameter in model.parameters())
    said = formula(family, shapes, sizes_of(model.config, family))
    return [
        f"the model has {count:,} parameters, and its sizes make {said:,}"
    ] if said != count else [], f"{count:,} parameters, as its sizes say"


def _ties(model: Any) -> tuple[list[str], str]:
    said = bool(model.config.get_text_config().tie_word_embeddings)
    words = {True: "tied to the embedding", False: "a matrix of its own"}
    return [f"config.json says that the head is {words[said]}, and it is not"] if is_tied(
        model
    ) != said else [], f"the head is {words[said]}"


def cached(model: Any, tokens: Tensor) -> tuple[list[str], str]:
    """(what is wrong, what was found right) with generation from a cache.

    Logits are compared at each step of greedy generation, not the texts: of two equal logits either may be the next token.

    Args:
        model: The model.
        tokens: int64 [1, S], of which the first are the prompt.
    """
    prompt = tokens[:, :_PROMPT]
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or prompt.shape[1] + _GENERATED
    steps = min(_GENERATED, room - prompt.shape[1])
    text, cache, given, far = prompt, None, prompt, 0.0
    with torch.inference_mode():
        for _ in range(steps):
            seen = model(input_ids=given, past_key_values=cache, use_cache=True)
            cache = seen.past_key_values
            far = max(far, _difference(seen.logits[:, -1], model(input_ids=text, use_cache=False).logits[:, -1]))
            given = seen.logits[:, -1:].argmax(-1)
            text = torch.cat([text, given], 1)
    problem = f"generating {steps} tokens with a cache computes other logits than without (difference {far:.3g})"
    return [] if far <= TOLERANCE else [problem], f"generating {steps} tokens with a cache computes what it does without"


def _logits(model: Any, tokens: Tensor) -> Tensor:
    return torch.cat([model(input_ids=row[None], use_cache=False).logits for row in tokens])


def _difference(one: Tensor, two: Tensor) -> float:
    """Largest difference, relative to the largest of ``two`` if that is above 1; NaN if one is."""
    return float((one - two).abs().max() / max(1.0, float(two.abs().max())))
