"""Structured pruning of FFN channels: the dense model becomes smaller, and every server runs it faster.

A channel c of a gated FFN is one row of the gate projection and of the up projection (with their biases) and one column of the down
projection. All layers keep the same number of channels, so the result is an ordinary Hugging Face model with a smaller
``intermediate_size``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..batches import backbone_inputs
from ..common.errors import NonFiniteError, UserError
from ..eval_mode import eval_mode
from ..families import Family, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALIGNMENT = 128
"""The number of kept channels should be a multiple of this for int4 groups of 128 and packed kernels."""


@torch.no_grad()
def ffn_channel_scores(model: "PreTrainedModel", batches: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """Importance of every FFN channel: ``S_c = ||W_down[:, c]||_2 * mean_t |a_tc|``, a = the input of the down projection.

    The mean is over all unmasked tokens of all batches (fp64 sums), so it does not depend on the batching. The model runs in eval mode and
    is in its former mode afterwards.

    Args:
        model: Llama, Mistral, Qwen2 or Qwen3.
        batches: ``input_ids`` [B, S] and, with padding, ``attention_mask`` [B, S], or ``position_ids`` of packed windows.

    Returns:
        One fp32 tensor [channels] per decoder layer, on the CPU.

    Raises:
        UserError: the family is unknown, or there is no token to score on.
        NonFiniteError: a layer's activations or weights are NaN or infinite.
    """
    family = family_of(model)
    downs = [family.linear(layer, family.ffn_out) for layer in family.layers(model)]
    # [channels] per layer
    sums = [torch.zeros(down.in_features, dtype=torch.float64, device=down.weight.device) for down in downs]
    # a box that the hooks read: the mask of the current batch
    keep_rows: list[Tensor] = [torch.empty(0)]
    # the input of the down projection is the activation of the channels, after gate and up projection
    handles = [down.register_forward_pre_hook(_adder(total, keep_rows)) for down, total in zip(downs, sums)]
    tokens = 0
    try:
        with eval_mode(model):
            for batch in batches:
                # packed windows have no padding: every token counts
                mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).to(model.device)
                keep_rows[0] = mask.bool()
                tokens += int(mask.sum())
                # the backbone alone: scores need no logits
                model.base_model(**backbone_inputs(batch, model.device))
    finally:
        for handle in handles:
            handle.remove()
    if tokens == 0:
        raise UserError(
            "prune.structured needs text to score channels on, and the calibration text has no token; raise "
            "prune.calibration_tokens or give more text"
        )
    return [_score(index, down.weight, total / tokens) for index, (down, total) in enumerate(zip(downs, sums))]


def _adder(total: Tensor, keep_rows: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Pre-hook of a down projection that adds |a| of the unmasked tokens to ``total`` [channels]."""

    def add(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # [B, S, channels] with a mask [B, S] -> [real tokens, channels] -> [channels]
        # fp64 sums: independent of how the text is cut into batches
        total.add_(inputs[0][keep_rows[0]].abs().sum(0, dtype=torch.float64))

    return add


def _score(index: int, down: Tensor, mean_activation: Tensor) -> Tensor:
    # the norm of column c: how far one unit of channel c moves the layer's output
    score = (down.double().norm(dim=0) * mean_activation).float().cpu()
    if not bool(torch.isfinite(score).all()):
        raise NonFiniteError(f"FFN channel scores of layer {index} are not finite: the model's weights or activations overflow")
    return score


@torch.no_grad()
def prune_ffn(model: "PreTrainedModel", scores: Sequence[Tensor], keep: int) -> dict[str, list[int]]:
    """Cuts every FFN down to its ``keep`` best channels, in place. Call it before an optimizer is made.

    The result equals setting the activations of the other channels to zero; no other number of the model changes. Of equal scores the first
    is kept, the order is preserved, and ``keep`` equal to the current number changes nothing.

    Args:
        model: Llama, Mistral, Qwen2 or Qwen3; ``intermediate_size`` of its config is set.
        scores: One tensor [channels] per decoder layer.
        keep: Channels kept in every layer.

    Returns:
        Kept indices, ascending, by FFN name (``model.layers.0.mlp``).

    Raises:
        UserError: the family is unknown, or ``keep`` is outside 1..channels.
        ValueError: the scores do not fit the model's layers.
    """
    family = family_of(model)
    layers = family.layers(model)
    channels: int = getattr(model.config, family.ffn_field)
    if not 1 <= keep <= channels:
        raise UserError(
            f"prune.structured.ffn={keep} is outside 1..{channels}: it is the number of FFN channels kept in each layer, and this model "
            f"has {channels}; give a smaller number, a multiple of {ALIGNMENT} if it will be quantized"
        )
    # a fault of the caller, not of a user
    if [tuple(score.shape) for score in scores] != [(channels,)] * len(layers):
        raise ValueError(
            f"scores of shapes {[tuple(score.shape) for score in scores]} do not fit {len(layers)} layers of {channels} channels"
        )
    kept: dict[str, list[int]] = {}
    for index, (layer, score) in enumerate(zip(layers, scores)):
        # the second sort keeps the order of channels, so that nothing but the selection changes
        chosen = torch.sort(score, descending=True, stable=True).indices[:keep].sort().values
        _slice_ffn(family, layer, chosen)
        kept[f"{family.layers_path}.{index}.{family.ffn}"] = chosen.tolist()
    # last, when all layers have the same number again
    setattr(model.config, family.ffn_field, keep)
    return kept


def _slice_ffn(family: Family, layer: nn.Module, chosen: Tensor) -> None:
    """Cuts one layer to the chosen rows of the input projections (and biases) and the chosen columns of the output projection."""
    for name in family.ffn_in:
        linear = family.linear(layer, name)
        linear.weight = _selected(linear.weight, 0, chosen)
        if isinstance(linear.bias, nn.Parameter):
            linear.bias = _selected(linear.bias, 0, chosen)
        linear.out_features = len(chosen)
    down = family.linear(layer, family.ffn_out)
    down.weight = _selected(down.weight, 1, chosen)
    down.in_features = len(chosen)
    # transformers' FFN modules keep the number as an attribute too
    ffn: Any = layer.get_submodule(family.ffn)
    if hasattr(ffn, family.ffn_field):
        setattr(ffn, family.ffn_field, len(chosen))


def _selected(parameter: Tensor, dim: int, chosen: Tensor) -> nn.Parameter:
    # a copy, so the large matrix can be freed
    # indices on the parameter's own device: layers may lie on several
    return nn.Parameter(parameter.index_select(dim, chosen.to(parameter.device)), requires_grad=parameter.requires_grad)


def alignment_hint(keep: int) -> str | None:
    """A sentence for the user if ``keep`` channels do not pack well; None if they do."""
    if keep % ALIGNMENT == 0:
        return None
    below = keep - keep % ALIGNMENT
    near = f"{below} or {below + ALIGNMENT}" if below else str(ALIGNMENT)
    return (
        f"prune.structured.ffn={keep} is not a multiple of {ALIGNMENT}: groups of {ALIGNMENT} do not divide the down projection, and "
        f"packed int4 kernels pad it or fall back; use {near}"
    )
