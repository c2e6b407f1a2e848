"""The rule that decides whether a runtime computes the trained model, from logits or predictions over the same tokens.

In fp32 and with the same operations, logits must agree to 1e-5 (relative to the largest logit if that is above 1): only the order of
additions may differ. In a runtime's own arithmetic, predictions are compared: the token must be the same wherever the fake-quant model's
first choice leads by more than 0.1 nat. Over at least 2,000 positions it must also be the same at 99 % of all positions, and the
perplexities may differ by ``MAX_PERPLEXITY_SHIFT``. A runtime returns whole logits (``compare_logits``) or its likeliest tokens
(``compare_predictions``).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOLERANCE = 1e-5
"""Largest difference of logits in fp32, relative to the largest logit if that is above 1."""
MARGIN = 0.1
"""Lead of the first choice over the second, in nats, above which both must choose the same token in any arithmetic."""
MIN_TOP1, MIN_POSITIONS = 0.99, 2000
"""Required share of positions with the same likeliest token, and the number of positions from which it is required."""
MAX_PERPLEXITY_SHIFT = {"transformers": 0.002, "vLLM": 0.002, "llama.cpp": 0.005}
"""Largest relative difference of perplexities by runtime, required from ``MIN_POSITIONS`` on. llama.cpp also rounds activations."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Comparison of a runtime with the fake-quant model over the same tokens. A NaN anywhere makes the differences NaN, which never
    agree."""

    top1: float
    """Share of positions with the same likeliest token."""
    decided_differently: int
    """Positions with different tokens although the fake-quant model's first choice leads by more than ``MARGIN``."""
    max_logprob_diff: float
    """Largest difference in nats, over the tokens that the runtime returned."""
    perplexity: float
    """Perplexity of the runtime, over all positions except the first of each row."""
    reference_perplexity: float
    positions: int
    max_logit_diff: float = math.nan
    """NaN if the runtime returned only log-probabilities."""
    largest_logit: float = 1.0
    """Largest absolute logit of the fake-quant model."""

    @property
    def perplexity_shift(self) -> float:
        """Return the relative difference of the perplexities."""
        return abs(self.perplexity / self.reference_perplexity - 1)

    def problem(self, max_shift: float | None) -> str | None:
        """Return what breaks the rule; None if the two agree.

        Args:
            max_shift: Largest relative difference of the perplexities; None requires equal logits in fp32.
        """
        if max_shift is None:
            # false for NaN
            equal = self.max_logit_diff <= TOLERANCE * max(1.0, self.largest_logit)
            return None if equal and self.top1 == 1.0 else f"logits differ by {self.max_logit_diff:.3g}, same token at {self.top1:.2%}"
        if not math.isfinite(self.max_logprob_diff):
            return "its logits are not finite"
        if self.decided_differently:
            return f"another token at {self.decided_differently} positions where the model's first choice leads by more than {MARGIN} nat"
        if self.positions < MIN_POSITIONS:
            return None
        if self.top1 < MIN_TOP1:
            return f"the same token at {self.top1:.2%} of {self.positions:,} positions, {MIN_TOP1:.0%} are required"
        # "not <=" instead of ">": a NaN must fail
        if not self.perplexity_shift <= max_shift:
            return f"perplexity {self.perplexity:.4f} instead of {self.reference_perplexity:.4f}"
        return None


def compare_logits(reference: Tensor, logits: Tensor, tokens: Tensor) -> Agreement:
    """Compare whole logits.

    Args:
        reference: fp32 [B, S, V], logits of the fake-quant model.
        logits: fp32 [B, S, V], logits of the runtime.
        tokens: int64 [B, S], the input of both.
    """
    counts = _Counts()
    logit_diff = torch.zeros(())
    logprob_diff = torch.zeros((), dtype=torch.float64)
    nll = 0.0
    # row by row: log-probabilities of all rows in fp64 would take twice the memory of both logits
    for expected, found, row in zip(reference, logits, tokens):
        logprobs = found.double().log_softmax(-1)
        wanted = counts.add(expected, found.argmax(-1), row)
        # torch.maximum propagates NaN, Python's max does not
        logit_diff = torch.maximum(logit_diff, (expected - found).abs().max())
        logprob_diff = torch.maximum(logprob_diff, (wanted - logprobs).abs().max())
        # position i predicts the token at i + 1
        nll -= float(logprobs[:-1].gather(1, row[1:, None]).sum())
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    return counts.agreement(
        tokens,
        max_logprob_diff=float(logprob_diff),
        perplexity=_perplexity(nll, predicted),
        max_logit_diff=float(logit_diff),
        largest_logit=float(reference.abs().max()),
    )


def compare_predictions(reference: Tensor, seen: dict[str, NDArray[Any]], tokens: Tensor) -> Agreement:
    """Compare the results of a runtime's ``teacher_forced`` (``llama_cpp_process.py``, ``vllm_process.py``).

    Args:
        reference: fp32 [B, S, V], logits of the fake-quant model.
        seen: ids and logprobs [B, S, K], likeliest first; next [B, S - 1], log-probability of the following token.
        tokens: int64 [B, S].
    """
    counts = _Counts()
    logprob_diff = torch.zeros((), dtype=torch.float64)
    for expected, ids, logprobs, row in zip(reference, torch.from_numpy(seen["ids"]), torch.from_numpy(seen["logprobs"]), tokens):
        wanted = counts.add(expected, ids[:, 0], row)
        logprob_diff = torch.maximum(logprob_diff, (wanted.gather(1, ids) - logprobs).abs().max())
    following = seen["next"].astype(np.float64)
    return counts.agreement(tokens, max_logprob_diff=float(logprob_diff), perplexity=_perplexity(-float(following.sum()), following.size))


class _Counts:
    """Counts of both comparisons, accumulated row by row."""

    def __init__(self) -> None:
        self.same, self.decided, self.nll = 0, 0, 0.0

    def add(self, expected: Tensor, chosen: Tensor, row: Tensor) -> Tensor:
        """Count one row: fp32 logits [S, V] of the fake-quant model, the runtime's tokens [S], the text [S]. Returns fp64
        log-probabilities [S, V]."""
        wanted = expected.double().log_softmax(-1)
        # [S, 2]: first and second choice, whose distance says how decided the model is
        best = wanted.topk(2, dim=-1).values
        equal = expected.argmax(-1) == chosen
        self.same += int(equal.sum())
        self.decided += int((~equal & (best[:, 0] - best[:, 1] > MARGIN)).sum())
        self.nll -= float(wanted[:-1].gather(1, row[1:, None]).sum())
        return wanted

    def agreement(self, tokens: Tensor, **found: Any) -> Agreement:
        return Agreement(
            top1=self.same / tokens.numel(),
            decided_differently=self.decided,
            reference_perplexity=_perplexity(self.nll, tokens.shape[0] * (tokens.shape[1] - 1)),
            positions=tokens.numel(),
            **found,
        )


def _perplexity(nll: float, predicted: int) -> float:
    # e^700 is near the largest fp64 number; beyond about 709 math.exp raises OverflowError
    return math.exp(min(nll / predicted, 700.0)) if predicted else math.nan
