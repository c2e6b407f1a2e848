"""Scores of FFN channels, heads, hidden channels and layers, in one pass over calibration text.

Sums are over unmasked tokens alone, in fp64, so they do not depend on how the text is cut into batches; documents of a packed window do not
see each other. The model runs in eval mode.

==================  ==================================================================================================================
score               of what is cut together
==================  ==================================================================================================================
weight_activation   norm of ||W[:, c]||_2 * mean_t |a_tc| over its channels c; a is what the matrices W read
activation          norm of sqrt(sum_s (mean_{t in s} |a_tc|)^2) over its channels c, s being the windows (Minitron, arXiv 2407.14679)
magnitude           norm of all its matrix elements
taylor              root of sum_s sum_w (w * dL_s/dw)^2 over all its parameters w, L_s being the loss of window s (arXiv 1906.10771)
==================  ==================================================================================================================

The norm over one FFN channel is the channel's number itself. A group of heads has the channels and parameters of its query heads, keys and
values. A hidden channel is read in many places; the numbers of ``activation`` and ``weight_activation`` add up over these.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..axis_map import WIDTHS, Axis
from ..batches import backbone_inputs
from ..common.errors import NonFiniteError, UserError
from ..eval_mode import eval_mode
from ..families import backbone_and_head
from ..family_map import family_of
from ..sizes import WORDS, ChannelScore, sizes_of
from .activations import Readers
from .grams import GramSums
from .loss_estimates import LossEstimates, windows
from .ranks import ALONE, Ranks
from .reductions import reduced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batches = Iterable[Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one model, fp32 on the CPU, per decoder layer."""

    axes: Mapping[Axis, list[Tensor]]
    """ffn, heads or kv_heads -> [size of the axis] per layer."""
    hidden: list[Tensor] = field(default_factory=list)
    """[hidden] per layer, and last that of what is outside the layers; not yet added up. [] if it was not asked for."""
    add_hidden: Callable[[Tensor], Tensor] = lambda total: total
    """What makes a score of the sum over all parts."""
    influence: Tensor | None = None
    """[layers]: 1 - mean cosine between input and output; None if it was not asked for."""

    def hidden_of(self, layers: Sequence[int]) -> Tensor:
        """Scores [hidden] in a model that has these layers."""
        return self.add_hidden(torch.stack([self.hidden[index] for index in (*layers, -1)]).sum(0))


def scored(
    model: "PreTrainedModel",
    batches: Batches,
    axes: Iterable[Axis],
    *,
    score: ChannelScore = "weight_activation",
    influence: bool = False,
    ranks: Ranks = ALONE,
) -> Scores:
    """Scores of all parts along ``axes``.

    Args:
        model: A model of a family with an axis map, in fp32; not changed.
        batches: ``input_ids`` [B, S] and, with padding, ``attention_mask`` [B, S], or ``position_ids`` of packed windows. Not read if
            weights alone are asked for.
        axes: Any of ffn, heads, kv_heads and hidden.
        score: How they are scored.
        influence: Whether layers are scored too.
        ranks: The processes that score together, each on its own batches.

    Raises:
        UserError: the family is unknown, or there is no token to score on.
        NonFiniteError: a score is NaN or infinite.
    """
    family = family_of(model)
    sizes = sizes_of(model.config, family)
    asked = set(axes)
    wanted: list[Axis] = [axis for axis in WIDTHS if axis in asked]
    with eval_mode(model):
        readers = Readers(model, family, wanted if score in ("activation", "weight_activation") else [], influence=influence)
        losses = LossEstimates(model, family, sizes, wanted) if wanted and score == "taylor" else None
        try:
            if readers.wanted or losses is not None:
                _read(model, batches, readers, losses=losses, ranks=ranks)
        finally:
            if losses is not None:
                model.zero_grad(set_to_none=True)
        if losses is not None:
            raw: Mapping[Axis, list[Tensor]] = losses.sums
        elif score == "magnitude":
            raw = {axis: reduced(model, family, sizes, axis, _squares_of_matrices) for axis in wanted}
        else:
            raw = readers.raw(score, sizes)
    return _finished(score, raw, wanted, readers.influence)


def activation_scores(
    model: "PreTrainedModel", batches: Batches, *, grams: Sequence[str] = (), ranks: Ranks = ALONE
) -> tuple[dict[ChannelScore, Scores], dict[str, Tensor]]:
    """All that one pass over the text gives: both scores of activations along every axis with the block influence, and Gram matrices.

    Args:
        model: As for ``scored``.
        batches: As for ``scored``.
        grams: Linears whose Gram matrices are summed in the same pass.
        ranks: As for ``scored``.

    Returns:
        (score -> scores, linear -> bands of its Gram matrix (``grams.whole``)).
    """
    family = family_of(model)
    sizes = sizes_of(model.config, family)
    found: dict[ChannelScore, Scores] = {}
    with eval_mode(model):
        readers = Readers(model, family, WIDTHS, influence=True)
        sums = GramSums(model, grams, readers.rows)
        _read(model, batches, readers, ranks=ranks, sums=sums)
        names: tuple[ChannelScore, ...] = ("weight_activation", "activation")
        for score in names:
            found[score] = _finished(score, readers.raw(score, sizes), WIDTHS, readers.influence)
    return found, {name: ranks.sum(value) for name, value in sums.sums.items()}


def adding_up(score: ChannelScore) -> Callable[[Tensor], Tensor]:
    """What makes a score of a hidden channel of the sum over all places (``Scores.add_hidden``)."""
    return torch.sqrt if score in ("magnitude", "taylor") else torch.clone


def _finished(score: ChannelScore, raw: Mapping[Axis, list[Tensor]], wanted: Sequence[Axis], influence: Tensor | None) -> Scores:
    """The scores, of what was summed."""
    found: dict[Axis, list[Tensor]] = {axis: [part.sqrt().float().cpu() for part in raw[axis]] for axis in wanted if axis != "hidden"}
    hidden = [part.float().cpu() for part in raw.get("hidden", [])]
    _check_finite(found, hidden, influence)
    return Scores(axes=found, hidden=hidden, add_hidden=adding_up(score), influence=influence)


def _read(
    model: "PreTrainedModel",
    batches: Batches,
    readers: Readers,
    *,
    ranks: Ranks,
    losses: LossEstimates | None = None,
    sums: GramSums | None = None,
) -> None:
    """Runs the text through the model once, with the hooks of ``readers``; window by window where ``losses`` needs gradients of each."""
    backbone, _, _ = backbone_and_head(model)
    tokens = 0
    with ExitStack() as hooks:
        hooks.enter_context(readers)
        if sums is not None:
            sums.hook(hooks)
        for batch in batches if losses is None else windows(batches):
            # packed windows have no padding: every token counts
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).to(model.device).bool()
            count = int(mask.sum())
            tokens += count
            if not count:
                continue
            readers.mask = mask
            if losses is not None:
                readers.add_final(losses.add(batch))
            else:
                with torch.no_grad():
                    readers.add_final(backbone(**backbone_inputs(batch, model.device)).last_hidden_state)
    readers.add_up(ranks)
    if losses is not None:
        losses.add_up(ranks)
    if ranks.number(tokens) == 0:
        raise UserError(
            "prune.structured needs text to score on, and the calibration text has no token; raise prune.calibration_tokens or give more "
            "text"
        )


def _squares_of_matrices(parameter: Tensor) -> Tensor:
    """w^2 of a matrix; zeros of a vector (norms, biases), which is of another scale."""
    return parameter.detach().double().square() if parameter.ndim > 1 else torch.zeros_like(parameter, dtype=torch.float64)


def _check_finite(axes: Mapping[Axis, list[Tensor]], hidden: Sequence[Tensor], influence: Tensor | None) -> None:
    named: dict[str, Sequence[Tensor]] = {WORDS[axis]: scores for axis, scores in axes.items()}
    named["hidden channels"] = hidden
    named["layers"] = [] if influence is None else list(influence)
    for words, scores in named.items():
        for index, part in enumerate(scores):
            if not bool(torch.isfinite(part).all()):
                where = f"layer {index}" if words != "hidden channels" or index < len(hidden) - 1 else "embedding, final norm or head"
                raise NonFiniteError(f"scores of {words} are not finite ({where}): the model's weights or activations overflow")
