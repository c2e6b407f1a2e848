"""Objective: one micro-batch of student, teacher and loss, as sums over its unmasked tokens (law 1, docs/architecture.md)."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...losses.linear_divergence import Backend, linear_divergence
from ...losses.linear_divergence.inputs import TeacherHidden, TeacherLogitsSource
from ...losses.settings import LossSettings
from ...losses.shift import shift_for_next_token
from ...losses.sums import LossSums
from ...models.batches import backbone_inputs
from ...models.common.errors import UserError
from ...models.families import backbone_and_head, head_transform
from ...models.hidden_states import Seen
from ...models.teachers import LocalTeacher, Teacher
from ..soft_targets.cached import SparseTeacher
from .features import Features
from .split_sums import SplitSums, split_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Objective:
    """What a training stage minimises. It is not a module, so its teacher is in no module tree, state dict or optimizer.

    Args:
        teacher: Model whose predictions the student learns; None = cross-entropy on the text.
        settings: Divergence, temperature, hard-label weight; with a weight of 1 the teacher is not used.
        v_eff: Number of tokens in the real vocabulary; heads are sliced to it.
        backend: Back end of ``linear_divergence``.
        features: Terms on hidden states and relations, if ``settings`` names some; their teacher is ``teacher``.

    Raises:
        UserError: the loss needs a teacher and there is none.
    """

    def __init__(
        self,
        teacher: Teacher | SparseTeacher | None,
        settings: LossSettings,
        *,
        v_eff: int,
        backend: Backend = "auto",
        features: Features | None = None,
    ) -> None:
        if teacher is None and settings.hard_weight < 1:
            raise UserError(
                f"loss.hard_weight={settings.hard_weight:g} needs a teacher; name one, or set hard_weight: 1 to train on the text alone"
            )
        self.settings = settings
        self.v_eff = v_eff
        self.teacher = None if settings.hard_weight == 1 else teacher
        self.backend: Backend = backend
        self.features = features

    @property
    def has_teacher(self) -> bool:
        """Whether the KL to a teacher is measured."""
        return self.teacher is not None

    def to(self, device: torch.device) -> "Objective":
        """Moves the teacher to a device."""
        if self.teacher is not None:
            self.teacher.to(device)
        if self.features is not None and self.features.projectors is not None:
            self.features.projectors.to(device)
        return self

    def __call__(self, student: "PreTrainedModel", batch: Mapping[str, Tensor]) -> LossSums:
        """Computes the loss sums of a micro-batch; ``loss`` has the autograd graph.

        Args:
            student: A causal language model of transformers.
            batch: input_ids, labels (-100 = no label), attention_mask and, for packed windows, position_ids; each [B, S] int64. With
                ``OWN``, ``PART`` or ``features`` the sums are ``SplitSums``.
        """
        # the backbone alone: calling the model would make logits [B, S, vocabulary], which are larger than everything else in memory
        backbone, head, bias = backbone_and_head(student)
        # last_hidden_state: [B, S, H]
        with self._watch(student, 0) as ours:
            output = backbone(**backbone_inputs(batch))
        hidden, labels = shift_for_next_token(output.last_hidden_state, batch["labels"])
        # hidden [B * (S - 1), H], labels [B * (S - 1)], row by row; the teacher's rows below are in the same order
        with self._watch(getattr(self.teacher, "model", None), 1) as theirs:
            targets = self._targets(batch)

        def sums(chosen: Tensor) -> LossSums:
            return linear_divergence(
                hidden,
                head,
                targets,
                chosen,
                self.settings,
                v_eff=self.v_eff,
                student_bias=bias,
                student_transform=head_transform(student.config),
                backend=self.backend,
            )

        found = split_sums(sums, labels, batch)
        return found if self.features is None else self._with_features(found, ours, theirs, batch)

    def _watch(self, model: Any, whose: int) -> Any:
        """Records what ``features`` need of a pass of the student (0) or the teacher (1)."""
        return nullcontext(Seen()) if self.features is None else self.features.watch(model, whose)

    def _with_features(self, sums: LossSums, ours: Seen, theirs: Seen, batch: Mapping[str, Tensor]) -> SplitSums:
        """``sums`` of the loss on predictions with the terms of ``features`` added."""
        assert self.features is not None and isinstance(self.teacher, LocalTeacher)
        found = self.features.terms(ours, theirs, batch)
        parts = {part.name: getattr(sums, part.name) for part in fields(sums)}
        parts["loss"] = sums.loss + sum(weight * term for weight, term in found.values())
        parts["terms"] = {"predictions": sums.loss.detach(), **{name: term.detach() for name, (_, term) in found.items()}}
        return SplitSums(**parts)

    def _targets(self, batch: Mapping[str, Tensor]) -> TeacherLogitsSource | None:
        if self.teacher is None:
            return None
        # from a cache or server: a few tokens and probabilities per position, already shifted and without a model to run
        if isinstance(self.teacher, SparseTeacher):
            return self.teacher.sparse_targets(batch)
        # not its logits: the loss multiplies hidden states and head in parts, and never holds them all
        hidden, head, bias, transform = self.teacher.hidden_and_head(batch)
        shifted, _ = shift_for_next_token(hidden, batch["labels"])
        return TeacherHidden(shifted, head, bias, transform)
