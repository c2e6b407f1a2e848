"""Sums of a batch by its rows: they add up, and each is that of its rows alone."""

from types import ModuleType
from typing import Any

import pytest
import torch

from decoct.losses.settings import LossSettings
from decoct.models.teachers import LocalTeacher
from decoct.trainer.data.joined_windows import PART
from decoct.trainer.loop.objective import Objective
from decoct.trainer.loop.split_sums import OWN, PART_SUMS, SplitSums
from decoct.trainer.soft_targets.capture import stack


@pytest.fixture
def measure(training: ModuleType) -> Any:
    """``measure(batch)``: sums and gradient of a student on a batch."""
    student = training.tiny_model(1, dropout=0.0)
    objective = Objective(LocalTeacher(training.tiny_model(2, dropout=0.0), v_eff=training.VOCAB), LossSettings(), v_eff=training.VOCAB)

    def measured(batch: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor]:
        sums = objective(student, batch)
        return sums, torch.cat([g.flatten() for g in torch.autograd.grad(sums.loss, list(student.parameters()))])

    return measured


def test_rows_of_texts_and_of_the_student_are_told_apart(measure: Any, training: ModuleType) -> None:
    batch = stack(training.RandomWindows(8), [0, 3, 5, 4, 7])
    whole, gradient = measure(batch)
    assert not isinstance(whole, SplitSums)
    # three texts, of which one has no row
    texts, own = torch.tensor([0, 2, 2, 0, 2]), torch.tensor([1, 0, 1, 0, 0])
    split, same = measure({**batch, PART: texts[:, None] == torch.arange(3), OWN: own})
    assert isinstance(split, SplitSums) and split.parts is not None and split.parts.shape == (3, len(PART_SUMS))
    for name in ("tokens", "loss", "kl", "cross_entropy", "teacher_entropy", "top1_matches", "covered_mass"):
        assert float(getattr(split, name).detach()) == pytest.approx(float(getattr(whole, name).detach()), rel=1e-5), name
    torch.testing.assert_close(same, gradient, rtol=1e-4, atol=1e-6)
    for text in range(3):
        rows = [row for row in range(5) if texts[row] == text]
        if not rows:
            assert split.parts[text].tolist() == [0.0] * 4
            continue
        alone, _ = measure({name: value[rows] for name, value in batch.items()})
        assert split.parts[text].tolist() == pytest.approx([float(getattr(alone, name).detach()) for name in PART_SUMS], rel=1e-5)
    mine, _ = measure({name: value[own.bool()] for name, value in batch.items()})
    assert split.own_tokens is not None and int(split.own_tokens) == int(mine.tokens)
    assert split.own_kl is not None and float(split.own_kl) == pytest.approx(float(mine.kl), rel=1e-5)


def test_texts_alone_have_no_sums_of_the_students_own(measure: Any, training: ModuleType) -> None:
    batch = stack(training.RandomWindows(8), [0, 3])
    split, _ = measure({**batch, PART: torch.tensor([[True, False], [False, True]])})
    assert split.own_tokens is None and split.own_kl is None and float(split.parts[:, 0].sum()) == int(split.tokens)
