"""A runtime that computes in its own arithmetic, beside the fake-quant model, along the same text.

The rule: the same token wherever the fake-quant model's first choice leads by more than 0.1 nat; over at least 2,000 positions of real
text also at 99 % of all positions, and a perplexity as near as each runtime's own file says.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MARGIN = 0.1
"""Nats between the first and the second choice above which both must choose the same."""
MIN_TOP1, MIN_POSITIONS = 0.99, 2000


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A runtime beside the fake-quant model, over the same tokens."""

    top1: float
    """Share of positions with the same likeliest token."""
    decided_differently: int
    """Positions where they choose differently though the fake-quant model's margin is above ``MARGIN``."""
    max_logprob_diff: float
    """Nats, over the tokens that the runtime gave."""
    perplexity: float
    """The runtime's."""
    reference_perplexity: float
    positions: int

    @property
    def perplexity_shift(self) -> float:
        """Relative difference of the perplexities."""
        return abs(self.perplexity / self.reference_perplexity - 1)

    def problem(self, max_shift: float) -> str | None:
        """What breaks the rule, with perplexities ``max_shift`` apart at most; None when they agree."""
        if self.decided_differently:
            return f"another token at {self.decided_differently} positions where the model's first choice leads by more than {MARGIN} nat"
        if self.positions < MIN_POSITIONS:
            return None
        if self.top1 < MIN_TOP1:
            return f"the same token at {self.top1:.2%} of {self.positions:,} positions, {MIN_TOP1:.0%} are asked for"
        if not self.perplexity_shift <= max_shift:
            return f"perplexity {self.perplexity:.4f} instead of {self.reference_perplexity:.4f}"
        return None


def compare(reference: Tensor, seen: dict[str, NDArray[Any]], tokens: Tensor) -> Agreement:
    """Compare with what a runtime's ``teacher_forced`` gave (``llama_cpp_check.py``, ``vllm_check.py``).

    Args:
        reference: fp32 logits [B, S, V].
        seen: ids and logprobs [B, S, K], next [B, S - 1].
        tokens: int64 [B, S].
    """
    logprobs = reference.double().log_softmax(-1)
    best = logprobs.topk(2, dim=-1)
    ids = torch.from_numpy(seen["ids"])
    differs = best.indices[..., 0] != ids[..., 0]
    margin = best.values[..., 0] - best.values[..., 1]
    following = logprobs[:, :-1].gather(2, tokens[:, 1:, None])
    return Agreement(
        top1=1 - float(differs.double().mean()),
        decided_differently=int((differs & (margin > MARGIN)).sum()),
        max_logprob_diff=float((logprobs.gather(2, ids) - torch.from_numpy(seen["logprobs"])).abs().max()),
        perplexity=math.exp(-float(seen["next"].astype(np.float64).mean())),
        reference_perplexity=math.exp(-float(following.mean())),
        positions=tokens.numel(),
    )
