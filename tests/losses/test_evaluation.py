"""Per-token figures of evaluation."""

import math

import pytest
import torch
import torch.nn.functional as F

from decoct.losses.divergences import forward_kl
from decoct.losses.evaluation import evaluation_sums


def test_figures_worked_out_by_hand() -> None:
    student = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]).log()
    teacher = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log()
    sums = evaluation_sums(student, teacher, torch.tensor([1, 2]))
    assert sums.nll.tolist() == pytest.approx([-math.log(0.2), -math.log(0.6)])
    assert sums.confidence.tolist() == pytest.approx([0.7, 0.6])
    assert sums.correct.tolist() == [False, True]
    assert sums.top1 is not None
    assert sums.top1.tolist() == [True, False]
    assert sums.kl is not None
    assert sums.kl[0].item() == pytest.approx(0.5 * math.log(0.5 / 0.7) + 0.25 * math.log(0.25 / 0.2) + 0.25 * math.log(0.25 / 0.1))


def test_text_is_judged_with_the_padding_and_the_teacher_without() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(16, 12, generator=generator), torch.randn(16, 9, generator=generator)
    student[0, 11] = 50.0
    labels = torch.arange(16) % 9
    sums = evaluation_sums(student, teacher, labels)
    torch.testing.assert_close(sums.nll, F.cross_entropy(student, labels, reduction="none"))
    assert sums.kl is not None
    torch.testing.assert_close(sums.kl, forward_kl(student[:, :9], teacher))
    assert sums.top1 is not None
    assert torch.equal(sums.top1, student[:, :9].argmax(-1) == teacher.argmax(-1))
    assert not sums.correct[0]
    assert sums.confidence[0].item() == pytest.approx(1.0)


def test_no_teacher_no_graph_no_tokens() -> None:
    sums = evaluation_sums(torch.randn(3, 5, requires_grad=True), None, torch.tensor([0, 1, 2]))
    assert sums.kl is None
    assert sums.top1 is None
    assert not sums.nll.requires_grad
    empty = evaluation_sums(torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert empty.nll.shape == (0,)


def test_bf16_logits_are_summed_in_fp32() -> None:
    logits = torch.randn(4, 300).bfloat16()
    sums = evaluation_sums(logits, logits, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(sums.nll, F.cross_entropy(logits.float(), torch.zeros(4, dtype=torch.int64), reduction="none"))
    assert sums.kl is not None
    assert sums.kl.dtype == torch.float32
    assert sums.kl.abs().max() == 0


def test_bad_input_is_refused() -> None:
    logits, labels = torch.zeros(2, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="run from -100 to 1, but 0 to 3 are allowed"):
        evaluation_sums(logits, None, torch.tensor([-100, 1]))
    with pytest.raises(ValueError, match="cut them to the real vocabulary"):
        evaluation_sums(logits, torch.zeros(2, 5), labels)
    with pytest.raises(ValueError, match="shift and flatten"):
        evaluation_sums(logits, None, torch.tensor([0]))
