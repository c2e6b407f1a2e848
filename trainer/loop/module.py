"""Lightning module whose gradients are the mean over all unmasked tokens of an optimizer step (law 1, docs/architecture.md).

Micro-batches return SUMS over their tokens. Lightning divides each by the accumulation count and DDP averages over ranks. So before
clipping, gradients are multiplied by world x accumulation / N, N = unmasked tokens of the whole optimizer step. They are then the
gradients of the mean over N for every micro-batch size, accumulation, world size and packing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ...losses.sums import LossSums
from ...models.common.errors import NonFiniteError
from ..plan import TrainingPlan, learning_rate
from ..processes.sharding import ParameterViews, reshard
from ..processes.world import World, gather_bytes, sum_over_ranks
from .hooks import StepHook
from .optimizer import build_optimizer
from .signals import StopSignals
from .split_sums import PART_SUMS, SplitSums
from .start_rate import StartRate

INDEX = "index"
"""Key of a batch's window indices, int64 [B]: they identify the windows of a loss that is not finite."""

_SUMS = ("tokens", "loss", "kl", "cross_entropy", "teacher_entropy", "top1_matches", "covered_mass")
_WITH_REVERSE_KL = ("reverse_kl", "symmetric_kl", "adaptive_kl")
# windows named in the error about a loss that is not finite; one micro-batch can hold far more
_NAMED_SAMPLES = 16


class Objectivelike(Protocol):
    """What a training stage minimises: any callable that returns loss sums, such as ``Objective``."""

    @property
    def has_teacher(self) -> bool:
        """Whether KL and teacher entropy are measured."""
        ...

    def to(self, device: torch.device) -> Any:
        """Moves its tensors and models to a device."""
        ...

    def __call__(self, student: Any, batch: Mapping[str, Tensor]) -> LossSums:
        """Sums over the unmasked tokens of a micro-batch."""
        ...


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, over all ranks and micro-batches."""

    step: int
    """Steps taken, this one included."""
    input_tokens: int
    """Input tokens without padding."""
    values: dict[str, float | None]
    """Means over unmasked tokens: loss, kl, cross_entropy, teacher_entropy, top1, covered_mass (None if no token was to be predicted, or
    no teacher is there to measure against); and learning_rate, grad_norm. With samples also own_kl and given_kl, and own_tokens. With
    features also the terms of the loss, without their weights: loss_predictions, loss_hidden, loss_relations."""
    stop: int | None
    """Signal number if any rank received one, else None."""


Shard = Callable[[nn.Module, Any, Any], None]
"""Called with (module whose forward runs the student, student, device mesh); shards the student over the mesh, in place."""


class _Forward(nn.Module):
    """Runs one micro-batch as a module call, because FSDP2 gathers the weights outside the decoder layers (the head, too) around it."""

    def __init__(self, student: nn.Module, objective: Objectivelike) -> None:
        super().__init__()
        self.student = student
        self._objective: Callable[[], Objectivelike] = lambda: objective

    def forward(self, batch: Mapping[str, Tensor], objective: "Objectivelike | None" = None) -> tuple[Tensor, LossSums]:
        """Returns (loss, sums); the loss separately, because FSDP2 finds tensors in tuples but not in dataclasses.

        ``objective`` is used instead of the module's own.
        """
        # backbone and head are called inside this forward: FSDP2 has gathered embedding, final norm and head here, and frees them
        # afterwards
        sums = (objective or self._objective())(self.student, batch)
        return sums.loss, sums


class TrainingModule(pl.LightningModule):
    """Holds only the student; objective and hooks are outside the module tree, its state dict and its optimizer."""

    def __init__(
        self,
        student: nn.Module,
        objective: Objectivelike,
        plan: TrainingPlan,
        *,
        hooks: Sequence[StepHook],
        world: World,
        signals: StopSignals,
        start_step: int,
        shard: "Shard | None" = None,
        texts: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.texts = tuple(texts)
        """Names of the texts of a blend, whose sums are kept apart."""
        self.student = student
        # in a function, because torch registers every module that is assigned to an attribute
        self._objective: Callable[[], Objectivelike] = lambda: objective
        forward = _Forward(student, objective)
        self._forward: Callable[[], _Forward] = lambda: forward
        self._shard = shard
        self._views: ParameterViews | None = None
        self._own: set[int] = set()
        self.plan = plan
        self.hooks = tuple(hooks)
        self.world = world
        self.signals = signals
        self.steps_done = start_step
        # of the micro-batches since the last optimizer step: sums of tokens, and (window indices, loss) of each
        self._sums: Tensor | None = None
        self._losses: list[tuple[Tensor, Tensor]] = []
        self._split = False
        self._terms: tuple[str, ...] = ()
        self._norm: Tensor | None = None
        self._record: StepRecord | None = None

    @property
    def views(self) -> ParameterViews:
        """The tensors that the optimizer steps, by parameter name."""
        assert self._views is not None, "Lightning configures the optimizers before anything else"
        return self._views

    def configure_model(self) -> None:
        """Shards the student over the ranks if the strategy does so."""
        if self._shard is not None:
            self._shard(self._forward(), self.student, self.device_mesh["data_parallel"])  # pyright: ignore[reportOptionalSubscript]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with the plan's numbers, over this rank's part of the student."""
        self._views = ParameterViews(self.student)
        self._own = {id(view) for view in self._views.views.values()}
        return build_optimizer(self.student, self.plan, self._views.views)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Drops the gradients, also those of sharded parameters, which the optimizer does not know."""
        self.views.drop_gradients()

    def on_fit_start(self) -> None:
        """Sets training mode: ``from_pretrained`` returns eval mode and Lightning keeps it, so dropout would silently be off."""
        self.student.train()
        self._objective().to(self.device)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The sum of the micro-batch's token losses."""
        self._sync_last(batch_idx)
        loss, sums = self._forward()(batch)
        # fp64, and kept on the device: reading the sums here would make the host wait for every micro-batch
        parts = [getattr(sums, name) for name in _SUMS] + [batch["attention_mask"].sum()]
        # every batch of a stage with samples has them, on every rank
        if isinstance(sums, SplitSums):
            self._split = sums.own_tokens is not None
            parts += [part for part in (sums.own_tokens, sums.own_kl) if part is not None]
            # the terms of a stage's loss are the same in every batch, too
            self._terms = tuple(sums.terms)
            parts += sums.terms.values()
        vector = torch.cat([torch.stack([part.detach().to(torch.float64) for part in parts]), _of_texts(sums)])
        self._sums = vector if self._sums is None else self._sums + vector
        self._losses.append((batch[INDEX], sums.loss.detach()))
        # the sum, not the mean: Lightning divides by the accumulation count, DDP and FSDP2 by the ranks; see on_before_optimizer_step
        return loss

    def _sync_last(self, batch_idx: int) -> None:
        """Under hsdp, sums gradients between machines in the last micro-batch of a step alone; inside machines they are summed in each."""
        forward: Any = self._forward()
        # a start has whole steps, so micro-batches count from a step's first one
        if self.views.copies > 1:
            forward.set_requires_all_reduce((batch_idx + 1) % self.plan.batch.accumulation == 0)

    def evaluation_sums(self, batch: Mapping[str, Tensor], objective: Objectivelike) -> Tensor:
        """fp64 [3]: sums of tokens, KL and cross-entropy of a micro-batch, and of blended text [4 * texts] ``PART_SUMS`` of each text.

        Call it without gradients; the step's sums do not change.
        """
        _, sums = self._forward()(batch, objective)
        whole = torch.stack([part.detach().to(torch.float64) for part in (sums.tokens, sums.kl, sums.cross_entropy)])
        return torch.cat([whole, _of_texts(sums)])

    def reshard(self) -> None:
        """Frees the weights that FSDP2 keeps gathered from a forward to its backward pass, after a forward without a backward."""
        reshard(self._forward())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Sums over ranks, scales gradients to the mean over tokens, and raises if loss or gradient norm is not finite."""
        # Lightning calls this inside the optimizer's closure: after the backward pass of the step's last micro-batch, before clipping, and
        # before AdamW reads rates and gradients.
        assert self._sums is not None
        # signals travel with the sums, so all ranks agree on the step after which they stop
        totals = sum_over_ranks(torch.cat([self._sums, self._sums.new_tensor(self.signals.counts())]))
        # before anything looks at gradients: FSDP2 has put them on the sharded parameters
        self.views.receive_gradients()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        # Undoes the division by accumulation and ranks, then divides by N (law 1, docs/architecture.md). It stays on the device, so nothing
        # waits for it; without the clamp N = 0 would give NaN.
        scale = self.world.size * self.plan.batch.accumulation / totals[0].clamp(min=1)
        with torch.no_grad():
            for gradient in gradients:
                gradient.mul_(scale.to(gradient.dtype))
        step = self.steps_done + 1
        # before the norm: hooks drop gradients, of removed weights for example, which must not count in it
        for hook in self.hooks:
            hook.before_step(step)
        self._norm = total_norm = self._total_norm(parameters)
        # one transfer for all numbers: the only place per step where the host waits for the device
        *sums, norm = torch.cat([totals, total_norm.to(totals)[None]]).tolist()
        self._refuse_non_finite(step, sums, norm)
        # no token to predict on any rank, so every rank takes this branch
        if sums[0] == 0:
            for parameter in parameters:
                # without a gradient AdamW leaves weights and moments alone; with zeros it would decay both
                parameter.grad = None
        rate = self._set_rate(optimizer, sums)
        self._record = self._describe(step, sums, norm, rate)
        self._sums, self._losses, self.steps_done = None, [], step

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: int | float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips by the norm that is already known."""
        if gradient_clip_val:
            assert self._norm is not None
            # not Lightning's clipping: under mixed precision it refuses fused optimizers
            # computing the norm again would read every gradient once more, and if sharded take another collective
            clip_grads_with_norm_([p for group in optimizer.param_groups for p in group["params"]], float(gradient_clip_val), self._norm)

    def _total_norm(self, parameters: list[Tensor]) -> Tensor:
        """Global norm of the gradients; for a sharded student over the rows of all ranks."""
        found = [(id(parameter), parameter.grad) for parameter in parameters if parameter.grad is not None]
        # what a hook has added to the optimizer is whole on every rank
        added = [gradient for key, gradient in found if key not in self._own]
        norm = get_total_norm([gradient for key, gradient in found if key in self._own] if self.views.sharded else [g for _, g in found])
        # Ranks hold disjoint rows, so squares add up; under hsdp each row is there once per machine. Under DDP every rank already has the
        # same gradients
        if not self.views.sharded:
            return norm
        squares = sum_over_ranks(norm.square()) / self.views.copies
        return (squares + get_total_norm(added).square() if added else squares).sqrt()

    def take_record(self) -> StepRecord | None:
        """Returns the record of a finished step once; None between micro-batches."""
        record, self._record = self._record, None
        return record

    def _set_rate(self, optimizer: torch.optim.Optimizer, sums: list[float]) -> float:
        """Sets the learning rate, a function of the step and of the first step's KL, so that a checkpoint needs no scheduler state."""
        plan = self.plan
        rate = learning_rate(self.steps_done, plan.total_steps, plan.learning_rate, plan.warmup, plan.schedule, plan.final_learning_rate)
        for hook in self.hooks:
            if isinstance(hook, StartRate):
                tokens, _, kl, *_ = sums
                # a first step without a token to predict says nothing, and takes no step
                if tokens > 0:
                    hook.see(kl / tokens)
                rate *= hook.share
        for group in optimizer.param_groups:
            # still inside the closure, so the step that follows uses it
            group["lr"] = rate * group["rate_share"]
        return rate

    def _describe(self, step: int, sums: list[float], norm: float, rate: float) -> StepRecord:
        tokens, loss, kl, cross_entropy, teacher_entropy, top1, covered, inputs, *rest = sums
        own, rest = (rest[:2], rest[2:]) if self._split else ([], rest)
        terms, rest = rest[: len(self._terms)], rest[len(self._terms) :]
        by_text, stops = rest[: len(PART_SUMS) * len(self.texts)], rest[len(PART_SUMS) * len(self.texts) :]
        count = max(tokens, 1.0)
        # a step without a token to predict has no loss: a 0 in the curves would look like a perfect student
        learnt = tokens > 0
        taught = learnt and self._objective().has_teacher
        values: dict[str, float | None] = {
            "loss": loss / count if learnt else None,
            "kl": kl / count if taught else None,
            "cross_entropy": cross_entropy / count if learnt else None,
            "teacher_entropy": teacher_entropy / count if taught else None,
            "top1": top1 / count if learnt else None,
            "covered_mass": covered / count if taught else None,
            "learning_rate": rate,
            "grad_norm": norm,
            **(_parted(tokens, kl, *own) if own else {}),
            **{f"loss_{name}": term / count if learnt else None for name, term in zip(self._terms, terms, strict=True)},
            **_text_values(self.texts, by_text, taught=self._objective().has_teacher),
        }
        return StepRecord(step, int(inputs), values, self.signals.agreed(stops))

    def _refuse_non_finite(self, step: int, sums: list[float], norm: float) -> None:
        """Raises if loss or norm is not finite: on every rank, because all have the same totals, and before a weight is changed."""
        # a finite loss may have an infinite gradient, and clipping would multiply by 0 and turn it into NaN
        if math.isfinite(sums[1]) and math.isfinite(norm):
            return
        # the culprits may be on another rank
        own = [int(i) for index, loss in self._losses if not bool(torch.isfinite(loss)) for i in index.tolist()]
        # a collective that every rank enters: all of them have the same sums and norm
        culprits = sorted({int(i) for part in gather_bytes(",".join(map(str, own)).encode()) for i in part.decode().split(",") if i})
        if culprits:
            named = ", ".join(map(str, culprits[:_NAMED_SAMPLES])) + (", ..." if len(culprits) > _NAMED_SAMPLES else "")
            what = f"the loss became {sums[1]} in step {step}, in a micro-batch of the training windows {named}"
        else:
            what = f"the gradient norm became {norm} in step {step} (the loss was {sums[1] / max(sums[0], 1.0):.4g})"
        raise NonFiniteError(f"{what}. The step was not taken. {self._why(sums)}")

    def _why(self, sums: list[float]) -> str:
        """The advice in the error message."""
        settings = getattr(self._objective(), "settings", None)
        divergence = settings.divergence if settings is not None and settings.hard_weight < 1 else ""
        # an infinite loss with finite forward KL and cross-entropy: only reverse KL is infinite, by teacher probabilities of 0
        if divergence in _WITH_REVERSE_KL and not math.isfinite(sums[1]) and math.isfinite(sums[2]) and math.isfinite(sums[3]):
            return (
                f"The teacher gives some tokens the probability 0 (logits of -inf), where {divergence} is infinite; use loss.divergence "
                "forward_kl, jsd, skew_forward_kl or skew_reverse_kl."
            )
        return "Lower the learning rate, or look at these windows and the teacher's logits."


def _of_texts(sums: LossSums) -> Tensor:
    """``PART_SUMS`` of the texts of a blend, fp64 [texts * 4]; empty without one."""
    parts = sums.parts if isinstance(sums, SplitSums) else None
    return sums.loss.new_zeros(0, dtype=torch.float64) if parts is None else parts.detach().flatten()


def _text_values(texts: Sequence[str], sums: Sequence[float], *, taught: bool) -> dict[str, float | None]:
    """Loss and KL per token of each text of a blend; None for one of which the step had no token to predict."""
    values: dict[str, float | None] = {}
    for number, name in enumerate(texts):
        tokens, loss, kl, _ = sums[number * len(PART_SUMS) : (number + 1) * len(PART_SUMS)]
        values[f"loss.{name}"] = loss / tokens if tokens else None
        if taught:
            values[f"kl.{name}"] = kl / tokens if tokens else None
    return values


def _parted(tokens: float, kl: float, own_tokens: float, own_kl: float) -> dict[str, float | None]:
    """KL per token on the student's own text and on all other text, whose difference is the exposure gap; None without such text."""
    others = tokens - own_tokens
    return {
        "own_kl": own_kl / own_tokens if own_tokens else None,
        "given_kl": (kl - own_kl) / others if others else None,
        "own_tokens": own_tokens,
    }
