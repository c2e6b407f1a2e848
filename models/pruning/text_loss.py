"""The loss of the next token on calibration text: of a model, of a model without some of its layers, and its gradients."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..batches import backbone_inputs
from ..common.errors import NonFiniteError, UserError
from ..eval_mode import eval_mode
from ..families import backbone_and_head, head_transform
from ..family_map import family_of
from .ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 1024
"""Tokens whose logits are in memory at a time."""


def predicted(batch: Mapping[str, Tensor]) -> Tensor:
    """[B, S] bool: the tokens whose next token is predicted: both are unmasked and in the same document."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    valid = mask[:, :-1] & mask[:, 1:]
    if (positions := batch.get("position_ids")) is not None:
        # a document of a packed window begins at position 0
        valid = valid & (positions[:, 1:] == positions[:, :-1] + 1)
    return nn.functional.pad(valid, (0, 1))


@torch.no_grad()
def mean_loss(model: "PreTrainedModel", batches: Iterable[Mapping[str, Tensor]], ranks: Ranks = ALONE) -> float:
    """Mean cross-entropy of the next token, in nats, over all predicted tokens; fp32 logits over the whole head, eval mode.

    Args:
        model: The model.
        batches: The text; of several ``ranks`` each reads its own.
        ranks: The processes whose sums are added.

    Raises:
        UserError: the text has no two tokens in a row.
        NonFiniteError: the loss is NaN or infinite.
    """
    backbone, _, _ = backbone_and_head(model)
    total, tokens = 0.0, 0
    with eval_mode(model):
        for batch in batches:
            hidden = backbone(**backbone_inputs(batch, model.device)).last_hidden_state
            total += sum(float(loss.double()) for loss in _losses(model, hidden, batch))
            tokens += int(predicted(batch).sum())
    total, tokens = ranks.number(total), round(ranks.number(tokens))
    if tokens == 0:
        raise UserError(
            "the calibration text has no two tokens in a row to measure a loss on; raise prune.calibration_tokens or give more text"
        )
    if not math.isfinite(total):
        raise NonFiniteError("the loss on the calibration text is not finite: the model's weights or activations overflow")
    return total / tokens


def add_gradients(model: "PreTrainedModel", batch: Mapping[str, Tensor]) -> Tensor:
    """Adds the gradients of the batch's summed loss to ``parameter.grad``, and returns the output of the backbone [B, S, hidden].

    The logits of ``CHUNK`` tokens are in memory at a time.
    """
    backbone, _, _ = backbone_and_head(model)
    with torch.enable_grad():
        hidden: Tensor = backbone(**backbone_inputs(batch, model.device)).last_hidden_state
        # the head is differentiated piece by piece up to here, then the backbone once
        leaf = hidden.detach().requires_grad_()
        for loss in _losses(model, leaf, batch):
            loss.backward()
        if leaf.grad is not None:
            hidden.backward(leaf.grad)
    return hidden.detach()


def _losses(model: "PreTrainedModel", hidden: Tensor, batch: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The summed loss of the predicted tokens, in pieces."""
    _, weight, bias = backbone_and_head(model)
    transform = head_transform(model.config)
    rows, columns = predicted(batch).nonzero(as_tuple=True)
    targets = batch["input_ids"][rows, columns + 1].to(hidden.device)
    for start in range(0, len(rows), CHUNK):
        piece = slice(start, start + CHUNK)
        states = hidden[rows[piece], columns[piece]]
        logits = transform.apply(nn.functional.linear(states.to(weight.dtype), weight, bias).float())
        yield nn.functional.cross_entropy(logits, targets[piece], reduction="sum")


@contextmanager
def without_layers(model: "PreTrainedModel", layers: Sequence[int]) -> Iterator[None]:
    """Let some decoder layers hand on their input inside the block, without a cache."""
    chosen: list[Any] = [family_of(model).layers(model)[index] for index in layers]
    for layer in chosen:
        # on the instance, which hides the method of its class
        layer.forward = _handed_on
    try:
        yield
    finally:
        for layer in chosen:
            del layer.forward


def _handed_on(hidden_states: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return hidden_states
