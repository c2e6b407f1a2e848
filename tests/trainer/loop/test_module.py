"""Law 1 and what surrounds one optimizer step, through the real Trainer."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decoct.losses.linear_divergence import TeacherHidden
from decoct.losses.settings import DIVERGENCES, LossSettings
from decoct.models.common.errors import MemoryFullError, NonFiniteError, UserError
from decoct.trainer.loop.module import TrainingModule
from decoct.trainer.loop.objective import Objective
from decoct.trainer.loop.optimizer import build_optimizer
from decoct.trainer.loop.signals import StopSignals
from decoct.trainer.processes.world import World


class _Spy:
    """A hook that looks at gradients and weights around each step."""

    name = "spy"

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.order: list[str] = []

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.student, self.optimizer = student, optimizer
        self.order.append("start")

    def before_step(self, step: int) -> None:
        named = self.student.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        self.order.append(f"before {step}")

    def after_step(self, step: int) -> None:
        self.order.append(f"after {step}")

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.order.append("load")


def _poisoned(objective: Any, spoil: Callable[[Any, Mapping[str, Tensor]], Tensor]) -> Any:
    """The objective with its loss replaced."""

    class Poisoned:
        has_teacher = objective.has_teacher

        def to(self, device: torch.device) -> "Poisoned":
            return self

        def __call__(self, student: nn.Module, batch: Mapping[str, Tensor]) -> Any:
            sums = objective(student, batch)
            return replace(sums, loss=spoil(sums.loss, batch))

    return Poisoned()


@pytest.mark.parametrize("kind", ["distill", "pretrain"])
def test_gradients_are_those_of_the_mean_over_all_tokens_whatever_the_micro_batch(training: ModuleType, tmp_path: Path, kind: str) -> None:
    gradients = {}
    for micro in (1, 2, 8):
        spy = _Spy()
        case = training.Case(kind=kind, steps=1, micro=micro, dropout=0.0)
        training.run_case(case, tmp_path / str(micro), hooks=[spy])
        gradients[micro] = spy.gradients[0]
    # the definition: one graph over the windows of the step, sum of losses / number of unmasked tokens
    case = training.Case(kind=kind, dropout=0.0)
    student, objective = case.student(), case.objective()
    order = torch.tensor(_order(case, training))
    rows = [training.RandomWindows()[int(i)] for i in order]
    sums = objective(student, {key: torch.stack([row[key] for row in rows]) for key in rows[0]})
    (sums.loss / sums.tokens).backward()
    unmasked = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    assert int(sums.tokens) == unmasked
    for name, parameter in student.named_parameters():
        for micro, found in gradients.items():
            assert parameter.grad is not None
            error = (found[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error < 2e-5, (micro, name, float(error))


def _order(case: Any, training: ModuleType) -> list[int]:
    from decoct.trainer.data.order import StepBatches

    plan = case.plan()
    windows = training.RandomWindows()
    sizes = {"global_batch": plan.batch.global_windows, "micro_batch": plan.batch.global_windows}
    return next(iter(StepBatches(windows, **sizes, rank=0, world=1, seed=plan.seed, start_step=0, total_steps=1)))


def test_metrics_are_means_over_tokens_and_do_not_change_with_the_micro_batch(training: ModuleType, tmp_path: Path) -> None:
    lines = []
    for micro in (1, 8):
        case = training.Case(steps=4, micro=micro, dropout=0.0)
        training.run_case(case, tmp_path / str(micro))
        lines.append(_metrics(tmp_path / str(micro)))
    for one, eight in zip(*lines):
        assert one["tokens"] == eight["tokens"]
        for name in ("loss", "kl", "cross_entropy", "teacher_entropy", "top1", "grad_norm", "learning_rate"):
            assert one[name] == pytest.approx(eight[name], rel=2e-5), name
    assert lines[0][0]["cross_entropy"] == pytest.approx(math.log(96), rel=0.05), "an untrained student knows nothing of random tokens"


def _metrics(work: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def test_a_line_has_the_promised_numbers(training: ModuleType, tmp_path: Path) -> None:
    training.run_case(training.Case(steps=2), tmp_path)
    expected = "stage step tokens loss kl cross_entropy teacher_entropy top1 covered_mass learning_rate grad_norm tokens_per_second"
    assert [list(line) for line in _metrics(tmp_path)] == [[*expected.split(), "peak_memory_bytes", "data_epochs", "seconds"]] * 2
    training.run_case(training.Case(steps=1, kind="pretrain"), tmp_path / "alone")
    assert _metrics(tmp_path / "alone")[0]["kl"] is None


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("micro", [2, 8])
def test_a_loss_that_is_not_finite_stops_before_any_weight_moves(training: ModuleType, tmp_path: Path, where: str, micro: int) -> None:
    case = training.Case(steps=9, micro=micro, every=2)
    order = _order(case, training)
    weights: list[dict[str, Tensor]] = []
    spy = _Spy()
    calls = 0

    def spoil(loss: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls <= 5 * (8 // micro):
            return loss
        weights.append({name: tensor.clone() for name, tensor in spy.student.state_dict().items()})
        if where == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    student = case.student()
    with pytest.raises(NonFiniteError) as caught:
        training.run_case(case, tmp_path, student=student, hooks=[spy], objective=_poisoned(case.objective(), spoil))
    message = str(caught.value)
    assert "step 6" in message
    assert "The checkpoint of step 4 is kept" in message
    assert ("training windows" if where == "loss" else "gradient norm") in message
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in student.state_dict().items())
    assert len(_metrics(tmp_path)) == 5, "the bad step is in no metrics"
    assert order is not None
    # and the stage goes on from there once the cause is gone
    result, _ = training.run_case(case, tmp_path)
    assert result.resumed_from == 4


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_that_cannot_say_a_token_stops_reverse_kl_alone_and_the_hint_works(
    training: ModuleType, tmp_path: Path, divergence: Any
) -> None:
    """Infinite before the first step, and the divergences that the message names train on."""

    class Mute(Objective):
        def _targets(self, batch: Mapping[str, Tensor]) -> TeacherHidden:
            theirs = super()._targets(batch)
            assert isinstance(theirs, TeacherHidden)
            bias = torch.zeros(len(theirs.head))
            bias[7] = -torch.inf
            return replace(theirs, bias=bias)

    case = training.Case(steps=1, micro=8)
    teacher = case.objective().teacher
    for hard_weight in (0.0, 0.25):
        objective = Mute(teacher, LossSettings(divergence=divergence, hard_weight=hard_weight), v_eff=training.VOCAB)
        place = tmp_path / str(hard_weight)
        if divergence not in ("reverse_kl", "symmetric_kl", "adaptive_kl"):
            assert math.isfinite(training.run_case(case, place, objective=objective)[0].metrics["loss"])
            continue
        with pytest.raises(NonFiniteError, match=rf"probability 0 .* where {divergence} is infinite; use loss.divergence forward_kl, jsd"):
            training.run_case(case, place, objective=objective)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), None])
def test_memory_that_runs_out_names_what_to_lower_and_what_is_kept(training: ModuleType, tmp_path: Path, error: Exception | None) -> None:
    case = training.Case(steps=6, micro=8, every=2)
    calls = 0

    def spoil(loss: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls <= 3:
            return loss
        if error is not None:
            raise error
        return loss + torch.empty(2**60, dtype=torch.uint8).sum()

    with pytest.raises(
        MemoryFullError, match=r"ran out of memory.*trainer\.micro_batch \(now 8\).*The checkpoint of step 2 is kept"
    ) as caught:
        training.run_case(case, tmp_path, objective=_poisoned(case.objective(), spoil))
    assert ("the GPU" in str(caught.value)) == isinstance(error, torch.OutOfMemoryError)
    # fewer windows at once are no other stage
    assert training.run_case(training.Case(steps=6, micro=2, every=2), tmp_path)[0].resumed_from == 2


def test_the_windows_of_the_bad_micro_batch_are_named(training: ModuleType, tmp_path: Path) -> None:
    case = training.Case(steps=2, micro=2)
    bad = _order(case, training)[2:4]

    def spoil(loss: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return loss * float("nan") if set(batch["index"].tolist()) == set(bad) else loss

    with pytest.raises(NonFiniteError, match=rf"training windows {min(bad)}, {max(bad)}\.") as caught:
        training.run_case(case, tmp_path, objective=_poisoned(case.objective(), spoil))
    assert "No checkpoint was written yet" in str(caught.value)


def test_a_step_without_any_label_changes_nothing(training: ModuleType, tmp_path: Path) -> None:
    class Blank(training.RandomWindows):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            window = super().__getitem__(index)
            return {**window, "labels": torch.full_like(window["labels"], -100)}

    case = training.Case(steps=2, decay=0.5)
    result, student = training.run_case(case, tmp_path, windows=Blank())
    untouched = case.student().state_dict()
    assert all(torch.equal(untouched[name], tensor) for name, tensor in student.state_dict().items())
    assert result.metrics["loss"] is None


def test_gradients_are_clipped_to_the_global_norm_after_scaling(training: ModuleType, tmp_path: Path) -> None:
    class Sgd(_Spy):
        def after_step(self, step: int) -> None:
            self.clipped = torch.stack([p.grad.norm() for p in self.student.parameters() if p.grad is not None]).norm()

    spy = Sgd()
    training.run_case(training.Case(steps=1, clip=0.05), tmp_path / "a", hooks=[spy])
    before = torch.stack([gradient.norm() for gradient in spy.gradients[0].values()]).norm()
    assert float(before) > 0.05
    assert float(spy.clipped) == pytest.approx(0.05, rel=1e-4)
    assert _metrics(tmp_path / "a")[0]["grad_norm"] == pytest.approx(float(before), rel=1e-5)
    training.run_case(training.Case(steps=1, clip=0.0), tmp_path / "b", hooks=[spy])
    assert float(spy.clipped) == pytest.approx(float(before), rel=1e-5)


def test_the_rate_follows_the_schedule_by_step(training: ModuleType, tmp_path: Path) -> None:
    from decoct.trainer.plan import learning_rate

    case = training.Case(steps=10)
    training.run_case(case, tmp_path)
    rates = [line["learning_rate"] for line in _metrics(tmp_path)]
    assert rates == [learning_rate(step, 10, case.rate, 0.05, "cosine", 0.1) for step in range(10)]
    assert rates[-1] == pytest.approx(0.1 * case.rate)


def test_hooks_act_in_order_around_each_step(training: ModuleType, tmp_path: Path) -> None:
    spy = _Spy()
    training.run_case(training.Case(steps=2, micro=2), tmp_path, hooks=[spy])
    assert spy.order == ["start", "before 1", "after 1", "before 2", "after 2"]


def test_the_student_trains_and_the_teacher_is_nowhere(training: ModuleType, tmp_path: Path) -> None:
    case = training.Case(steps=2, every=1)
    objective, student = case.objective(), case.student()
    teacher = objective.teacher.model
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    modes: list[tuple[bool, bool]] = []
    inner = objective.__call__

    class Watched:
        has_teacher = True

        def __init__(self) -> None:
            self.teacher = teacher  # even a module in plain sight must not be registered

        def to(self, device: torch.device) -> "Watched":
            return self

        def __call__(self, student: nn.Module, batch: Mapping[str, Tensor]) -> Any:
            modes.append((student.training, teacher.training))
            return inner(student, batch)

    watched = Watched()
    module = TrainingModule(student, watched, case.plan(), hooks=(), world=World(), signals=StopSignals(), start_step=0)
    assert sum(1 for _ in module.parameters()) == sum(1 for _ in student.parameters())
    assert not any(inside is teacher for inside in module.modules())
    training.run_case(case, tmp_path, student=student, objective=watched)
    assert modes == [(True, False)] * 4
    assert not student.training, "ends in eval mode"
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    saved = sum(path.stat().st_size for path in (tmp_path / "stage/checkpoints/step-00000002").glob("student*"))
    assert saved < 1.2 * 4 * sum(parameter.numel() for parameter in student.parameters())


def test_only_matrices_decay_and_a_tied_head_does_not(training: ModuleType) -> None:
    plan = training.Case(decay=0.3).plan()
    for tied in (True, False):
        student = training.tiny_model(tied=tied)
        names = {parameter: name for name, parameter in student.named_parameters()}
        decaying, others = build_optimizer(student, plan).param_groups
        assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
        kept = {names[parameter] for parameter in others["params"]}
        assert kept == {name for name in names.values() if "norm" in name or "embed" in name}
        assert ("lm_head.weight" in {names[p] for p in decaying["params"]}) is not tied
        assert len(names) == len(decaying["params"]) + len(others["params"])


def test_master_weights_must_be_fp32_and_some_must_train(training: ModuleType) -> None:
    plan = training.Case().plan()
    with pytest.raises(UserError, match=r"embed_tokens\.weight is torch\.bfloat16; training needs fp32"):
        build_optimizer(training.tiny_model().to(torch.bfloat16), plan)
    with pytest.raises(UserError, match="no trainable parameter"):
        build_optimizer(training.tiny_model().requires_grad_(False), plan)


def test_bf16_mixed_keeps_fp32_weights_and_moments(training: ModuleType, tmp_path: Path) -> None:
    spy = _Spy()
    result, student = training.run_case(training.Case(steps=3, precision="bf16-mixed"), tmp_path, hooks=[spy])
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert {value.dtype for state in spy.optimizer.state.values() for value in state.values()} == {torch.float32}
    assert math.isfinite(result.metrics["loss"])
    training.run_case(training.Case(steps=3), tmp_path / "full")
    full = _metrics(tmp_path / "full")
    assert result.metrics["loss"] == pytest.approx(full[-1]["loss"], rel=0.02)
    assert result.metrics["loss"] != full[-1]["loss"]
