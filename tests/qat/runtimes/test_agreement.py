"""When a runtime agrees: whole logits and likeliest tokens are judged by one rule."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from decoct.qat.runtimes.agreement import MAX_PERPLEXITY_SHIFT, MIN_POSITIONS, Agreement, compare_logits, compare_predictions

TOKENS = torch.randint(0, 258, (2, 12), generator=torch.Generator().manual_seed(0))
LOGITS = torch.randn(2, 12, 258, generator=torch.Generator().manual_seed(1))
FAR = Agreement(top1=1.0, decided_differently=0, max_logprob_diff=0.2, perplexity=9.0, reference_perplexity=9.0, positions=2000)


def test_equal_logits_agree_and_give_the_perplexity() -> None:
    seen = compare_logits(LOGITS, LOGITS.clone(), TOKENS)
    nll = torch.nn.functional.cross_entropy(LOGITS[:, :-1].reshape(-1, 258).double(), TOKENS[:, 1:].reshape(-1))
    assert seen.problem(None) is None
    assert (seen.top1, seen.max_logprob_diff) == (1.0, 0.0)
    assert seen.perplexity == pytest.approx(nll.exp().item(), rel=1e-12)


def test_one_wrong_logit_is_seen() -> None:
    other = LOGITS.clone()
    other[1, 5, 100] += 1e-3
    seen = compare_logits(LOGITS, other, TOKENS)
    assert seen.problem(None)
    assert seen.top1 == 1.0
    assert seen.max_logit_diff == pytest.approx(1e-3, rel=1e-2)
    assert seen.max_logprob_diff > 0


def test_one_other_token_is_seen() -> None:
    other = LOGITS.clone()
    best = other[0, 0].argmax()
    other[0, 0, best] = other[0, 0].min()
    assert compare_logits(LOGITS, other, TOKENS).top1 == pytest.approx(23 / 24)


@pytest.mark.parametrize("row", [0, 1])
def test_nan_never_agrees(row: int) -> None:
    other = LOGITS.clone()
    other[row, 3, 7] = float("nan")
    seen = compare_logits(LOGITS, other, TOKENS)
    assert seen.problem(None)
    assert seen.problem(1.0) == "its logits are not finite"
    assert math.isnan(seen.max_logit_diff)
    assert math.isnan(seen.max_logprob_diff)


def test_differences_are_judged_by_the_size_of_the_logits() -> None:
    assert compare_logits(LOGITS * 100, LOGITS * 100 + 1e-3, TOKENS).problem(None) is None
    assert compare_logits(LOGITS * 0.1, LOGITS * 0.1 + 2e-5, TOKENS).problem(None)


def likeliest(logits: torch.Tensor, count: int) -> dict[str, Any]:
    """What a runtime's server gives of these logits."""
    logprobs = logits.double().log_softmax(-1)
    best = logprobs.topk(count, dim=-1)
    following = logprobs[:, :-1].gather(2, TOKENS[:, 1:, None])[..., 0]
    return {"ids": best.indices.numpy(), "logprobs": best.values.float().numpy(), "next": following.float().numpy()}


def test_likeliest_tokens_are_compared_as_whole_logits_are() -> None:
    other = LOGITS + 0.3 * torch.randn(LOGITS.shape, generator=torch.Generator().manual_seed(2))
    whole, some = compare_logits(LOGITS, other, TOKENS), compare_predictions(LOGITS, likeliest(other, 258), TOKENS)
    assert whole.decided_differently > 0
    assert (some.top1, some.decided_differently, some.positions) == (whole.top1, whole.decided_differently, 24)
    assert some.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert some.max_logprob_diff == pytest.approx(whole.max_logprob_diff, rel=1e-5)
    assert some.problem(1.0) == whole.problem(1.0)
    assert some.problem(None), "log-probabilities alone are no equal logits"
    seen = likeliest(LOGITS, 20)
    assert compare_predictions(LOGITS, seen, TOKENS).problem(0.0) is None
    seen["logprobs"][1, 3, 7] = np.nan
    assert compare_predictions(LOGITS, seen, TOKENS).problem(1.0) == "its logits are not finite"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"top1": 0.99}, None),
        ({"top1": 0.9895}, "the same token at 98.95% of 2,000 positions, 99% are required"),
        ({"decided_differently": 1}, "another token at 1 positions"),
        ({"perplexity": 9.0 * 1.0019}, None),
        ({"perplexity": 9.0 * 1.0021}, "perplexity 9.0189 instead of 9.0000"),
        ({"perplexity": math.nan}, "perplexity nan instead of 9.0000"),
        ({"top1": 0.5, "perplexity": 99.0, "positions": 1999}, None),
        ({"decided_differently": 1, "positions": 1999}, "another token at 1 positions"),
    ],
)
def test_the_rule_for_a_runtimes_own_arithmetic(change: dict[str, Any], words: str | None) -> None:
    found = replace(FAR, **change).problem(MAX_PERPLEXITY_SHIFT["transformers"])
    assert found is None if words is None else words in str(found)


SPREAD = torch.randn(20, 128, 50, generator=torch.Generator().manual_seed(0)) * 4
TEXT = torch.randint(0, 50, (20, 128), generator=torch.Generator().manual_seed(1))


def seen_from(logits: torch.Tensor) -> dict[str, np.ndarray]:
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(8, dim=-1)
    following = logprobs[:, :-1].gather(2, TEXT[:, 1:, None])[..., 0]
    return {"ids": best.indices.numpy(), "logprobs": best.values.numpy(), "next": following.numpy()}


def test_equal_predictions_agree() -> None:
    found = compare_predictions(SPREAD, seen_from(SPREAD), TEXT)
    nll = torch.nn.functional.cross_entropy(SPREAD[:, :-1].reshape(-1, 50).double(), TEXT[:, 1:].reshape(-1))
    assert (found.top1, found.decided_differently, found.problem(0.005)) == (1.0, 0, None)
    assert found.max_logprob_diff < 1e-5
    assert found.perplexity == pytest.approx(nll.exp().item(), rel=1e-5)
    assert found.positions == 2560 >= MIN_POSITIONS


def test_a_clear_choice_made_differently_is_a_problem_and_a_near_tie_is_not() -> None:
    near = SPREAD.clone()
    top = near[0, 0].topk(2)
    near[0, 0, top.indices[1]] = top.values[0] - 0.05
    other = near.clone()
    other[0, 0, top.indices[1]] = top.values[0] + 0.05
    assert compare_predictions(near, seen_from(other), TEXT).problem(0.005) is None
    assert "another token at 1 positions" in str(compare_predictions(SPREAD, seen_from(_swapped()), TEXT).problem(0.005))


def _swapped() -> torch.Tensor:
    other = SPREAD.clone()
    top = other[3, 7].topk(2)
    other[3, 7, top.indices] = top.values.flip(0)
    assert top.values[0] - top.values[1] > 0.1
    return other


def test_a_runtime_that_thinks_the_text_impossible_differs_and_crashes_nothing() -> None:
    seen = seen_from(SPREAD)
    seen["next"] = np.full_like(seen["next"], -1000.0)
    found = compare_predictions(SPREAD, seen, TEXT)
    assert found.perplexity == pytest.approx(math.exp(700))
    assert "perplexity" in str(found.problem(0.005))


def test_rows_of_one_token_have_no_perplexity() -> None:
    seen = {name: values[:, :1] for name, values in seen_from(SPREAD).items()}
    seen["next"] = seen["next"][:, :0]
    found = compare_predictions(SPREAD[:, :1], seen, TEXT[:, :1])
    assert math.isnan(found.perplexity)
    assert math.isnan(found.reference_perplexity)
    assert found.top1 == 1.0
