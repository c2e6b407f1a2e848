"""Lightning module whose gradients are the mean over all unmasked tokens of an optimizer step (law 1, docs/architecture.md).

Micro-batches return SUMS over their tokens. Lightning divides each by the accumulation count and DDP averages over ranks, so
before clipping gradients are multiplied by world x accumulation / N, N = unmasked tokens of the whole optimizer step. They are
then the gradients of the mean over N, whatever the micro-batch size, accumulation, world size or packing.
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
from ..processes.sharding import ParameterViews
from ..processes.world import World, gather_bytes, sum_over_ranks
from .hooks import StepHook
from .optimizer import build_optimizer
from .signals import StopSignals

INDEX = "index"
"""Key of a batch's window indices, int64 [B]: they name the culprits when a loss is not finite."""

_SUMS = ("tokens", "loss", "kl", "cross_entropy", "teacher_entropy", "top1_matches", "covered_mass")
_WITH_REVERSE_KL = ("reverse_kl", "symmetric_kl", "adaptive_kl")
_NAMED_SAMPLES = 16


class Objectivelike(Protocol):
    """What a training stage minimises: any callable that gives sums, such as ``Objective``."""

    @property
    def has_teacher(self) -> bool:
        """Whether KL and teacher entropy mean anything."""
        ...

    def to(self, device: torch.device) -> Any:
        """Move what it holds."""
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
    """Real tokens fed in (padding not counted)."""
    values: dict[str, float | None]
    """Means over unmasked tokens: loss, kl, cross_entropy, teacher_entropy, top1, covered_mass (None where none was to be predicted); and
    learning_rate, grad_norm."""
    stop: int | None
    """Signal number when any rank was asked to stop."""


Shard = Callable[[nn.Module, Any, Any], None]
"""(module whose forward runs the student, student, device mesh): spreads the student over the mesh, in place."""


class _Forward(nn.Module):
    """One micro-batch as a module call: FSDP2 gathers what lies outside the decoder layers, the head among it, around this forward."""

    def __init__(self, student: nn.Module, objective: Objectivelike) -> None:
        super().__init__()
        self.student = student
        self._objective: Callable[[], Objectivelike] = lambda: objective

    def forward(self, batch: Mapping[str, Tensor], objective: "Objectivelike | None" = None) -> tuple[Tensor, LossSums]:
        """(loss, sums): the loss by itself, because FSDP2 looks for tensors in tuples, not in dataclasses. ``objective``: another one."""
        sums = (objective or self._objective())(self.student, batch)
        return sums.loss, sums


class TrainingModule(pl.LightningModule):
    """Holds the student alone; objective and hooks are outside the module tree, its state dict and its optimizer."""

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
    ) -> None:
        super().__init__()
        self.student = student
        # a function, not an attribute: a module assigned here would be registered, whatever it is
        self._objective: Callable[[], Objectivelike] = lambda: objective
        forward = _Forward(student, objective)
        self._forward: Callable[[], _Forward] = lambda: forward
        self._shard = shard
        self._views: ParameterViews | None = None
        self.plan = plan
        self.hooks = tuple(hooks)
        self.world = world
        self.signals = signals
        self.steps_done = start_step
        self._sums: Tensor | None = None
        self._losses: list[tuple[Tensor, Tensor]] = []
        self._norm: Tensor | None = None
        self._record: StepRecord | None = None

    @property
    def views(self) -> ParameterViews:
        """What the optimizer steps, by parameter name."""
        assert self._views is not None, "Lightning configures the optimizers before anything else"
        return self._views

    def configure_model(self) -> None:
        """Spread the student over the ranks, where the strategy says so."""
        if self._shard is not None:
            self._shard(self._forward(), self.student, self.device_mesh["data_parallel"])  # pyright: ignore[reportOptionalSubscript]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with the plan's numbers, over this rank's part of the student."""
        self._views = ParameterViews(self.student)
        return build_optimizer(self.student, self.plan, self._views.views)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Also of the sharded parameters, which the optimizer does not know."""
        self.views.drop_gradients()

    def on_fit_start(self) -> None:
        """``from_pretrained`` returns eval mode and Lightning keeps it: dropout would silently be off."""
        self.student.train()
        self._objective().to(self.device)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Sum of the micro-batch's token losses."""
        loss, sums = self._forward()(batch)
        parts = [getattr(sums, name) for name in _SUMS] + [batch["attention_mask"].sum()]
        vector = torch.stack([part.detach().to(torch.float64) for part in parts])
        self._sums = vector if self._sums is None else self._sums + vector
        self._losses.append((batch[INDEX], sums.loss.detach()))
        return loss

    def evaluation_sums(self, batch: Mapping[str, Tensor], objective: Objectivelike) -> Tensor:
        """fp64 [3]: tokens, KL and cross-entropy of a micro-batch, summed. Call it without gradients; nothing is noted for the step."""
        _, sums = self._forward()(batch, objective)
        return torch.stack([part.detach().to(torch.float64) for part in (sums.tokens, sums.kl, sums.cross_entropy)])

    def reshard(self) -> None:
        """Let go of what FSDP2 keeps whole between a forward and its backward, after a forward that has none."""
        release = getattr(self._forward(), "reshard", None)
        if release is not None:
            release()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Sum over ranks, scale gradients to the mean over tokens, and refuse to go on when anything is not finite."""
        assert self._sums is not None
        totals = sum_over_ranks(torch.cat([self._sums, self._sums.new_tensor(self.signals.counts())]))
        self.views.receive_gradients()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        scale = self.world.size * self.plan.batch.accumulation / totals[0].clamp(min=1)
        with torch.no_grad():
            for gradient in gradients:
                gradient.mul_(scale.to(gradient.dtype))
        step = self.steps_done + 1
        for hook in self.hooks:
            hook.before_step(step)
        self._norm = total_norm = self._total_norm(gradients)
        # the one place per step where the host waits for the device
        *sums, norm = torch.cat([totals, total_norm.to(totals)[None]]).tolist()
        self._refuse_non_finite(step, sums, norm)
        if sums[0] == 0:
            for parameter in parameters:
                parameter.grad = None  # AdamW then leaves weights and moments alone: nothing was learnt
        rate = self._set_rate(optimizer)
        self._record = self._describe(step, sums, norm, rate)
        self._sums, self._losses, self.steps_done = None, [], step

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: int | float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm that is known already."""
        if gradient_clip_val:
            assert self._norm is not None
            clip_grads_with_norm_([p for group in optimizer.param_groups for p in group["params"]], float(gradient_clip_val), self._norm)

    def _total_norm(self, gradients: list[Tensor]) -> Tensor:
        """Global norm: of what is here, or of all ranks' rows together."""
        norm = get_total_norm(gradients)
        return sum_over_ranks(norm.square()).sqrt() if self.views.sharded else norm

    def take_record(self) -> StepRecord | None:
        """The step that has just been taken, once; None between micro-batches."""
        record, self._record = self._record, None
        return record

    def _set_rate(self, optimizer: torch.optim.Optimizer) -> float:
        """The rate is a function of the step alone: there is no scheduler state to lose."""
        plan = self.plan
        rate = learning_rate(self.steps_done, plan.total_steps, plan.learning_rate, plan.warmup, plan.schedule, plan.final_learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate_share"]
        return rate

    def _describe(self, step: int, sums: list[float], norm: float, rate: float) -> StepRecord:
        tokens, loss, kl, cross_entropy, teacher_entropy, top1, covered, inputs, *stops = sums
        count = max(tokens, 1.0)
        # a step without a token to predict has no loss: 0 would look like success
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
        }
        return StepRecord(step, int(inputs), values, self.signals.agreed(stops))

    def _refuse_non_finite(self, step: int, sums: list[float], norm: float) -> None:
        """Every rank sees the same totals, so every rank raises, and before its optimizer has moved a weight."""
        if math.isfinite(sums[1]) and math.isfinite(norm):
            return
        own = [int(i) for index, loss in self._losses if not bool(torch.isfinite(loss)) for i in index.tolist()]
        culprits = sorted({int(i) for part in gather_bytes(",".join(map(str, own)).encode()) for i in part.decode().split(",") if i})
        if culprits:
            named = ", ".join(map(str, culprits[:_NAMED_SAMPLES])) + (", ..." if len(culprits) > _NAMED_SAMPLES else "")
            what = f"the loss became {sums[1]} in step {step}, in a micro-batch of the training windows {named}"
        else:
            what = f"the gradient norm became {norm} in step {step} (the loss was {sums[1] / max(sums[0], 1.0):.4g})"
        raise NonFiniteError(f"{what}. The step was not taken. {self._why(sums)}")

    def _why(self, sums: list[float]) -> str:
        """What to do about it; a loss alone is not finite where reverse KL is asked of a teacher that gives tokens the probability 0."""
        settings = getattr(self._objective(), "settings", None)
        divergence = settings.divergence if settings is not None and settings.hard_weight < 1 else ""
        if divergence in _WITH_REVERSE_KL and not math.isfinite(sums[1]) and math.isfinite(sums[2]) and math.isfinite(sums[3]):
            return (
                f"The teacher gives some tokens the probability 0 (logits of -inf), where {divergence} is infinite; use loss.divergence "
                "forward_kl, jsd, skew_forward_kl or skew_reverse_kl."
            )
        return "Lower the learning rate, or look at these windows and the teacher's logits."
