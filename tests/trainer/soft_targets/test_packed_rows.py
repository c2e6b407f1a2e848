"""What a cache keeps against the distribution it was taken from."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from decoct.losses.sparse import sparse_forward_kl
from decoct.models.settings import CacheMode, CacheSettings
from decoct.trainer.soft_targets.cached import row_format
from decoct.trainer.soft_targets.capture import kl_to_full
from decoct.trainer.soft_targets.choosing import choose_rows

VOCAB = 97


def distribution(rows: int, sharpness: float = 2.0, vocab: int = VOCAB) -> Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) * sharpness).log_softmax(1)


def kept(log_p: Tensor, settings: CacheSettings, temperature: float = 1.0):
    form = row_format(settings, log_p.shape[1], temperature)
    noise = torch.rand(len(log_p), 1 + form.top + form.others, generator=torch.Generator().manual_seed(4))
    data = form.encode(choose_rows(log_p, form, noise[:, 0]), None if form.tail else noise[:, 1:])
    assert data.dtype == torch.uint8
    assert data.shape == (len(log_p), form.bytes)
    targets = form.decode(data)
    targets.check(len(log_p), log_p.shape[1])
    return targets


@pytest.mark.parametrize(("mode", "most", "tokens"), [("top_k", 120, 50), ("sampled", 40, 12), ("hybrid", 97, 32)])
def test_bytes_a_token_at_a_vocabulary_of_128k(mode: CacheMode, most: int, tokens: int) -> None:
    form = row_format(CacheSettings(mode=mode), 128_256, 1.0)
    assert form.bytes <= most
    assert form.top + form.others == tokens


@pytest.mark.parametrize("mode", ["top_k", "sampled", "hybrid"])
def test_a_smaller_vocabulary_leaves_room_for_more_tokens(mode: CacheMode) -> None:
    large, small = (row_format(CacheSettings(mode=mode), v_eff, 1.0) for v_eff in (128_256, 2048))
    assert small.bytes <= large.bytes + 1
    assert small.others >= large.others + (0 if mode == "top_k" else 4)
    assert row_format(CacheSettings(mode=mode), 1, 1.0).top == 1


def test_top_k_keeps_the_likeliest_and_all_of_the_mass() -> None:
    log_p = distribution(50)
    targets = kept(log_p, CacheSettings(mode="top_k", tokens=20))
    wanted = log_p.topk(20, 1)
    assert torch.equal(targets.ids.sort(1).values, wanted.indices.sort(1).values)
    assert targets.log_tail is not None
    whole = targets.log_weights.exp().sum(1) + targets.log_tail.exp()
    torch.testing.assert_close(whole, torch.ones(50))
    outside = log_p.scatter(1, wanted.indices, -torch.inf).logsumexp(1)
    torch.testing.assert_close(targets.log_tail, outside, atol=0.1, rtol=0)
    # 4 bits for each but the first: a few percent
    error = (targets.log_weights - log_p.gather(1, targets.ids)).abs()
    assert error[:, :4].max() < 0.05
    assert error.max() < 0.35
    assert kl_to_full(targets, log_p).max() < 5e-3


@pytest.mark.parametrize("mode", ["top_k", "sampled", "hybrid"])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 8.0, 60.0])
def test_entropy_and_likeliest_token_are_the_whole_teachers(mode: CacheMode, sharpness: float) -> None:
    log_p = distribution(40, sharpness)
    targets = kept(log_p, CacheSettings(mode=mode))
    best = log_p.gather(1, targets.best.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(best, log_p.amax(1))
    torch.testing.assert_close(targets.entropy, torch.special.entr(log_p.exp()).sum(1), atol=1e-4, rtol=0)
    assert (targets.covered_mass() <= 1).all()
    assert targets.log_weights.isfinite().any(1).all()


@pytest.mark.parametrize("settings", [CacheSettings(mode="sampled", tokens=7), CacheSettings(mode="hybrid", tokens=12)])
@pytest.mark.parametrize("sharpness", [0.3, 2.0, 5.0])
def test_a_sample_is_the_distribution_in_expectation(settings: CacheSettings, sharpness: float) -> None:
    draws = 60_000
    one = distribution(1, sharpness, 23)
    targets = kept(one.expand(draws, -1), settings)
    weights = targets.log_weights.exp().double()
    dense = torch.zeros(draws, 23, dtype=torch.float64).scatter_add_(1, targets.ids, weights)
    spread = dense.std(0) / draws**0.5
    assert ((dense.mean(0) - one[0].double().exp()).abs() <= 5 * spread + 2e-5).all()


def test_a_sample_gives_the_gradient_of_the_whole_divergence_in_expectation() -> None:
    draws = 60_000
    one = distribution(1, 2.0, 23)
    student = distribution(1, 1.0, 23).requires_grad_()
    targets = kept(one.expand(draws, -1), CacheSettings(mode="sampled", tokens=7))
    value = sparse_forward_kl(student.expand(draws, -1), targets).mean()
    (got,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(got[0], (student.softmax(1) - one.exp())[0].detach(), atol=3e-3, rtol=0)
    full = (one.exp() * (one - student.log_softmax(1))).sum()
    assert float(value.detach()) == pytest.approx(float(full.detach()), abs=5e-3)


@pytest.mark.parametrize("sharpness", [0.3, 2.0, 5.0])
def test_a_sample_knows_how_its_tokens_were_drawn(sharpness: float) -> None:
    """sum_S q / r is 1 on average, whatever q is."""
    draws = 60_000
    student = distribution(1, 1.0, 23)
    targets = kept(distribution(1, sharpness, 23).expand(draws, -1), CacheSettings(mode="hybrid", tokens=12))
    assert targets.log_inclusion is not None
    assert (targets.log_inclusion <= 0).all()
    used = targets.log_weights > -torch.inf
    share = torch.where(used, (student[0][targets.ids] - targets.log_inclusion).double().exp(), 0.0).sum(1)
    assert abs(float(share.mean()) - 1) <= 5 * float(share.std()) / draws**0.5 + 1e-4


@pytest.mark.parametrize("mode", ["sampled", "hybrid"])
def test_a_student_like_its_teacher_gets_hardly_any_noise(mode: CacheMode) -> None:
    """The noise of the gradient is that of rounded weights: below a twentieth of what the draws alone give."""
    log_p = distribution(2000, 1.0)
    targets = kept(log_p, CacheSettings(mode=mode))
    noise = []
    for given in (targets, replace(targets, log_inclusion=None)):
        leaf = log_p.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(sparse_forward_kl(leaf, given).sum(), leaf)
        noise.append(float(gradient.square().sum()))
    assert 0 < noise[0] < noise[1] / 20


def test_samples_are_drawn_once_each_and_fill_the_row() -> None:
    targets = kept(distribution(200, 1.0), CacheSettings(mode="sampled", tokens=13))
    for ids, weights in zip(targets.ids, targets.log_weights):
        used = ids[weights > -torch.inf].tolist()
        assert len(set(used)) == len(used)
        assert 12 <= len(used) <= 13


def test_a_vocabulary_smaller_than_the_row_is_kept_whole() -> None:
    log_p = distribution(9, 1.5, 11)
    for mode in ("top_k", "hybrid"):
        targets = kept(log_p, CacheSettings(mode=mode))
        assert kl_to_full(targets, log_p).abs().max() < 0.02


@pytest.mark.parametrize("mode", ["top_k", "sampled", "hybrid"])
@pytest.mark.parametrize("alive", [60, 20, 3, 1])
def test_a_teacher_that_cannot_say_most_tokens_is_kept_as_well_as_any(mode: CacheMode, alive: int) -> None:
    """Logits of -inf: they take no slot, and the weights of the others are as fine as they would be without them."""
    logits = torch.randn(60, VOCAB, generator=torch.Generator().manual_seed(3))
    logits[:, alive:] = -torch.inf
    log_p = logits.log_softmax(1)
    targets = kept(log_p, CacheSettings(mode=mode))
    used = targets.log_weights > math.log(1e-9)
    assert bool((targets.ids[used] < alive).all())
    assert bool(kl_to_full(targets, log_p).isfinite().all())
    if mode != "sampled" and alive <= 20:
        assert float(kl_to_full(targets, log_p).max()) < 0.02
    student = torch.randn(60, VOCAB, generator=torch.Generator().manual_seed(4)).requires_grad_()
    value = sparse_forward_kl(student, targets)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    exact = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - student.log_softmax(1)), 0.0).sum(1)
    assert float((value - exact).detach().mean().abs()) < 0.3
    assert bool(gradient.isfinite().all())


def test_bytes_that_are_no_rows_are_refused() -> None:
    form = row_format(CacheSettings(), VOCAB, 1.0)
    with pytest.raises(ValueError, match="rows do not have"):
        form.decode(torch.zeros(3, form.bytes, dtype=torch.uint8))
