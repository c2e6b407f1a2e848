"""Terms of a loss on what is inside the teacher, hidden states and attention relations: sums over tokens (law 1, docs/architecture.md)."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...losses.features import hidden_loss
from ...losses.relations import relation_divergence, visible_tokens
from ...losses.settings_features import FeatureSettings
from ...losses.shift import MASKED, shift_for_next_token
from ...models.common.errors import UserError
from ...models.dimensions import hidden_size
from ...models.hidden_states import Seen, check_layers, seen_inside, vector_width
from ...models.layer_pairs import LayerPairs
from ...models.teachers import LocalTeacher
from .projectors import Projectors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is compared, with layers in place of the words of the settings."""

    settings: FeatureSettings
    hidden: LayerPairs
    """Empty without a term on hidden states."""
    relations: LayerPairs
    """Empty without a term on relations."""

    def vectors(self, whose: int) -> set[tuple[int, str]]:
        """(layer, q or k or v) that relations read of the student (0) or the teacher (1)."""
        of = self.settings.relations.of if self.settings.relations else ()
        return {(pair[whose], relation[0]) for pair in self.relations for relation in of}

    def layers(self, whose: int) -> set[int]:
        """Layers whose hidden states are read of the student (0) or the teacher (1)."""
        return {pair[whose] for pair in self.hidden}


class Features:
    """Terms on hidden states and relations, for an ``Objective``.

    Args:
        wanted: What is compared.
        student: The student as the stage trains it, whole or on the meta device.
        teacher: A teacher in memory.
        seed: Seed of the projectors' first values.

    Raises:
        UserError: hidden states or relations of a model cannot be read, or the relation heads do not divide the widths.
    """

    def __init__(self, wanted: Wanted, student: "PreTrainedModel", teacher: LocalTeacher, seed: int) -> None:
        for whose, (model, who) in enumerate(((student, "the student"), (teacher.model, "the teacher"))):
            check_layers(model, who, wanted.layers(whose), wanted.vectors(whose))
        self._wanted = wanted
        self.projectors: Projectors | None = None
        """Matrices to train as a hook; None where the widths are the same."""
        ours, theirs = hidden_size(student), hidden_size(teacher.model)
        if wanted.hidden and ours != theirs:
            self.projectors = Projectors(wanted.hidden, ours, theirs, seed, next(student.parameters()).dtype)
        self.heads = self._relation_heads(student, teacher) if wanted.relations else 0
        """Relation heads; 0 without relations."""

    def _relation_heads(self, student: "PreTrainedModel", teacher: LocalTeacher) -> int:
        settings = self._wanted.settings.relations
        assert settings is not None
        models = (student, teacher.model)
        widths = {vector_width(models[whose], layer, word) for whose in (0, 1) for layer, word in self._wanted.vectors(whose)}
        common = gcd(*widths)
        if settings.heads is None:
            most = int(getattr(teacher.model.config.get_text_config(), "num_attention_heads", 0) or common)
            return max(count for count in range(1, min(most, common) + 1) if common % count == 0)
        if common % settings.heads:
            fitting = [count for count in range(1, common + 1) if common % count == 0]
            raise UserError(
                f"loss.features.relations.heads={settings.heads} does not divide the widths {sorted(widths)} of queries, keys and values; "
                f"use one of {', '.join(map(str, fitting[-8:]))}"
            )
        return settings.heads

    def watch(self, model: "PreTrainedModel", whose: int) -> AbstractContextManager[Seen]:
        """Records what the terms need of a pass of the student (0) or the teacher (1)."""
        return seen_inside(model, self._wanted.layers(whose), self._wanted.vectors(whose))

    def terms(self, student: Seen, teacher: Seen, batch: Mapping[str, Tensor]) -> dict[str, tuple[float, Tensor]]:
        """Name of each term -> (its weight, its sum over the unmasked tokens of ``batch``, with an autograd graph)."""
        settings, found = self._wanted.settings, {}
        if settings.hidden is not None:
            found["hidden"] = settings.hidden.weight, self._hidden(student, teacher, batch["labels"])
        if settings.relations is not None:
            found["relations"] = settings.relations.weight, self._relations(student, teacher, batch)
        return found

    def _hidden(self, student: Seen, teacher: Seen, labels: Tensor) -> Tensor:
        """Sum over tokens of the mean over pairs."""
        settings, total = self._wanted.settings.hidden, torch.zeros((), device=labels.device)
        assert settings is not None
        for pair in self._wanted.hidden:
            own, shifted = shift_for_next_token(student.hidden[pair[0]], labels)
            theirs, _ = shift_for_next_token(teacher.hidden[pair[1]], labels)
            # masked rows are left out and not multiplied by 0: what padding computes may be NaN
            rows = (shifted != MASKED).nonzero().squeeze(1)
            projector = self.projectors.weights[pair] if self.projectors else None
            # computed again in the backward pass: otherwise each pair would keep copies of its states
            total = total + checkpoint(
                _summed_distance, own, theirs.to(own.device), rows, settings.loss, projector, use_reentrant=False, preserve_rng_state=False
            )
        return total / len(self._wanted.hidden)

    def _relations(self, student: Seen, teacher: Seen, batch: Mapping[str, Tensor]) -> Tensor:
        """Sum over tokens of the mean over pairs, relations and heads."""
        settings, labels = self._wanted.settings.relations, batch["labels"]
        assert settings is not None
        total = torch.zeros((), device=labels.device)
        for row in range(len(labels)):
            # packed windows have positions and no padding, as in ``models.batches``
            mask = None if "position_ids" in batch else batch.get("attention_mask")
            positions = batch["position_ids"][row] if "position_ids" in batch else None
            visible = visible_tokens(positions, None if mask is None else mask[row], labels.shape[1])
            learnt = (labels[row, 1:] != MASKED).nonzero().squeeze(1)
            for pair in self._wanted.relations:
                for relation in settings.of:
                    own = student.vectors[pair[0], relation[0]][row]
                    theirs = teacher.vectors[pair[1], relation[0]][row].to(own.device)
                    # one sequence's [heads, S, S] at a time, in the backward pass too
                    total = total + checkpoint(
                        _summed_relation, own, theirs, visible, learnt, self.heads, use_reentrant=False, preserve_rng_state=False
                    )
        return total / (len(self._wanted.relations) * len(settings.of))


def _summed_distance(own: Tensor, theirs: Tensor, rows: Tensor, kind: str, projector: Tensor | None) -> Tensor:
    return hidden_loss(own[rows], theirs[rows], kind, projector).sum()  # pyright: ignore[reportArgumentType]


def _summed_relation(own: Tensor, theirs: Tensor, visible: Tensor, rows: Tensor, heads: int) -> Tensor:
    # row i belongs to the prediction of token i + 1, as the rows of every other loss
    return relation_divergence(own, theirs, visible, heads)[rows].sum()
