"""When a runtime computes the model that was trained: the one rule for all of them, over the same tokens.

In fp32 and with the same order of operations the logits must be equal to 1e-5 (of the largest logit, where that is above 1): only the order
of additions may differ. In a runtime's own arithmetic the predictions are compared: the same token wherever the fake-quant model's first
choice leads by more than 0.1 nat; over at least 2,000 positions of real text also at 99 % of all positions, and a perplexity as near as
``MAX_PERPLEXITY_SHIFT`` says. A runtime gives whole logits (``compare_logits``) or its likeliest tokens (``compare_predictions``).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOLERANCE = 1e-5
"""Largest difference of logits in fp32, relative to the largest logit where that is above 1."""
MARGIN = 0.1
"""Nats between the first and the second choice above which both must choose the same, in whatever arithmetic."""
MIN_TOP1, MIN_POSITIONS = 0.99, 2000
"""Share of positions with the same likeliest token, asked for from so many positions on."""
MAX_PERPLEXITY_SHIFT = {"transformers": 0.002, "vLLM": 0.002, "llama.cpp": 0.005}
"""By runtime: relative difference of the perplexities, asked for from ``MIN_POSITIONS`` on. llama.cpp also rounds activations."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A runtime and the fake-quant model over the same tokens. A NaN anywhere makes the differences NaN, which never agrees."""

    top1: float
    """Share of positions with the same likeliest token."""
    decided_differently: int
    """Positions where they choose differently though the fake-quant model's first choice leads by more than ``MARGIN``."""
    max_logprob_diff: float
    """Nats, over the tokens that the runtime gave."""
    perplexity: float
    """The runtime's, over all positions but the first of each row."""
    reference_perplexity: float
    positions: int
    max_logit_diff: float = math.nan
    """NaN where the runtime gave log-probabilities alone, which are never equal in fp32."""
    largest_logit: float = 1.0
    """Of the fake-quant model."""

    @property
    def perplexity_shift(self) -> float:
        """Relative difference of the perplexities."""
        return abs(self.perplexity / self.reference_perplexity - 1)

    def problem(self, max_shift: float | None) -> str | None:
        """What breaks the rule; None when they agree.

        Args:
            max_shift: Largest relative difference of the perplexities; None where logits must be equal in fp32.
        """
        if max_shift is None:
            equal = self.max_logit_diff <= TOLERANCE * max(1.0, self.largest_logit)
            return None if equal and self.top1 == 1.0 else f"logits differ by {self.max_logit_diff:.3g}, same token at {self.top1:.2%}"
        if not math.isfinite(self.max_logprob_diff):
            return "it gave logits that are no finite numbers"
        if self.decided_differently:
            return f"another token at {self.decided_differently} positions where the model's first choice leads by more than {MARGIN} nat"
        if self.positions < MIN_POSITIONS:
            return None
        if self.top1 < MIN_TOP1:
            return f"the same token at {self.top1:.2%} of {self.positions:,} positions, {MIN_TOP1:.0%} are asked for"
        if not self.perplexity_shift <= max_shift:
            return f"perplexity {self.perplexity:.4f} instead of {self.reference_perplexity:.4f}"
        return None


def compare_logits(reference: Tensor, logits: Tensor, tokens: Tensor) -> Agreement:
    """Compare whole logits.

    Args:
        reference: fp32 [B, S, V] of the fake-quant model.
        logits: fp32 [B, S, V] of the runtime.
        tokens: int64 [B, S], what both were given.
    """
    counts = _Counts()
    logit_diff = torch.zeros(())
    logprob_diff = torch.zeros((), dtype=torch.float64)
    nll = 0.0
    # row by row: log-probabilities of all rows in fp64 would take twice the memory of both logits
    for expected, found, row in zip(reference, logits, tokens):
        logprobs = found.double().log_softmax(-1)
        wanted = counts.add(expected, found.argmax(-1), row)
        # torch.maximum passes NaN on, Python's max does not
        logit_diff = torch.maximum(logit_diff, (expected - found).abs().max())
        logprob_diff = torch.maximum(logprob_diff, (wanted - logprobs).abs().max())
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
    """Compare what a runtime's ``teacher_forced`` gave (``llama_cpp_process.py``, ``vllm_process.py``).

    Args:
        reference: fp32 logits [B, S, V] of the fake-quant model.
        seen: ids and logprobs [B, S, K], likeliest first; next [B, S - 1], log-probability of the token that follows.
        tokens: int64 [B, S].
    """
    counts = _Counts()
    logprob_diff = torch.zeros((), dtype=torch.float64)
    for expected, ids, logprobs, row in zip(reference, torch.from_numpy(seen["ids"]), torch.from_numpy(seen["logprobs"]), tokens):
        wanted = counts.add(expected, ids[:, 0], row)
        logprob_diff = torch.maximum(logprob_diff, (wanted.gather(1, ids) - logprobs).abs().max())
    return counts.agreement(
        tokens, max_logprob_diff=float(logprob_diff), perplexity=math.exp(-float(seen["next"].astype(np.float64).mean()))
    )


class _Counts:
    """What both comparisons count, row by row."""

    def __init__(self) -> None:
        self.same, self.decided, self.nll = 0, 0, 0.0

    def add(self, expected: Tensor, chosen: Tensor, row: Tensor) -> Tensor:
        """Take up fp32 logits [S, V] of the fake-quant model, the runtime's tokens [S] and the text [S]; returns fp64 log-probabilities."""
        wanted = expected.double().log_softmax(-1)
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
    # e^700 is near the largest number of fp64
    return math.exp(min(nll / predicted, 700.0)) if predicted else math.nan
