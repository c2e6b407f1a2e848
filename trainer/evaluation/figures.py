"""Quality of a model on held-out windows and its distance from the teacher, in fp32, a few thousand tokens at a time.

Perplexity uses the full head of the model, as serving runtimes do. Comparisons with the teacher use the real vocabulary that both share.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ...losses.evaluation import evaluation_sums
from ...losses.shift import MASKED, shift_for_next_token
from ...models.batches import backbone_inputs
from ...models.common.errors import NonFiniteError, UserError
from ...models.eval_mode import eval_mode
from ...models.families import HeadTransform, backbone_and_head, head_transform
from ..data.windows import Windows
from .spread import Blocks, block_sums, errors_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...models.teachers import Teacher

BATCH_TOKENS = 4096
"""Tokens per forward pass when ``batch`` is not given."""
LOGITS = 2**26
"""Largest number of logits in memory at once (256 MB in fp32). Hidden states go through the head in parts of this size."""
ECE_BINS = 15
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Figures over ``tokens`` predicted tokens. Those that need a teacher are None without one."""

    perplexity: float
    """exp of the mean negative log-likelihood of the text, over non-overlapping windows."""
    kl: float | None
    """Mean of KL(teacher || model) per token, in nats."""
    kl_p99: float | None
    """99th percentile of the per-token KL, exact (linear between neighbours)."""
    top1: float | None
    """Share of positions where model and teacher have the same most likely next token."""
    ece: float
    """Expected calibration error of the most likely token, 15 bins of equal width (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    tokens: int
    perplexity_se: float | None
    """Standard error of the perplexity over blocks of the text (``spread.py``); None with a single block."""
    kl_se: float | None
    """Standard error of the KL."""
    top1_se: float | None
    """Standard error of the top-1 agreement."""
    blocks: Blocks
    """Sums over blocks, from which paired differences of two models are made."""


@dataclass
class _Tally:
    """Per-token figures, collected on the CPU: each list holds fp32 tensors [N], one per part of a batch."""

    nll: list[Tensor]
    confidence: list[Tensor]
    correct: list[Tensor]
    kl: list[Tensor]
    top1: list[Tensor]
    windows: list[int]
    """Predicted tokens of each window."""


Head = tuple[Tensor, Tensor | None, HeadTransform]
"""Weight [V, H], bias [V] or None, and what follows them."""


def evaluate_model(
    model: "PreTrainedModel",
    teacher: "Teacher | None",
    windows: Windows,
    *,
    device: str | torch.device = "cpu",
    batch: int | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Evaluate ``model`` on ``windows``, against ``teacher`` if there is one.

    Args:
        model: Causal language model with fp32 weights, on ``device``. Runs in eval mode; the mode of every module is restored.
        teacher: Model to compare with, over its ``v_eff`` tokens; must be on ``device``.
        windows: Held-out text. The first token of each window and padding are not predicted.
        device: Device of the model and the teacher.
        batch: Windows per forward pass; default: as many as fit into 4,096 tokens, at least one.
        progress: Called with (finished windows, total windows).

    Raises:
        ValueError: a weight of the model is not fp32.
        NonFiniteError: a logit is NaN or infinite. The teacher's logits may be -inf, which means probability 0 (``losses.divergences``).
        UserError: the windows hold no token to predict.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}; figures are taken in fp32: load the model with dtype=torch.float32")
    # fixed and not fitted to memory: batch sizes change the last bits of matrix products, and figures should be the same on every machine
    batch = batch or max(1, BATCH_TOKENS // windows.seq_length)
    backbone, weight, bias = backbone_and_head(model)
    head: Head = (weight, bias, head_transform(model.config))
    tally = _Tally([], [], [], [], [], [])
    with torch.no_grad(), eval_mode(model), exact_products(torch.device(device).type):
        for first in range(0, len(windows), batch):
            last = min(first + batch, len(windows))
            inputs = _stack(windows, first, last, device)
            output = backbone(**backbone_inputs(inputs))
            _add(tally, output.last_hidden_state, head, teacher, inputs)
            # checked per batch, so that the message can name the windows
            if tally.nll and not torch.isfinite(tally.nll[-1]).all():
                raise NonFiniteError(
                    f"the model's logits are NaN or infinite on evaluation windows {first} to {last - 1}; it is not usable"
                )
            if tally.kl and tally.kl[-1].isnan().any():
                raise NonFiniteError(
                    f"the teacher's logits are NaN or infinite on evaluation windows {first} to {last - 1}; nothing can be compared with it"
                )
            if progress is not None:
                progress(last, len(windows))
    if not tally.nll:
        raise UserError("no window of the held-out text has a token to predict; give text that is longer, or whose prompts are shorter")
    return _result(tally)


def _stack(windows: Windows, first: int, last: int, device: str | torch.device) -> dict[str, Tensor]:
    rows = [windows[index] for index in range(first, last)]
    return {key: torch.stack([row[key] for row in rows]).to(device) for key in rows[0]}


def _add(tally: _Tally, hidden: Tensor, head: Head, teacher: "Teacher | None", inputs: dict[str, Tensor]) -> None:
    """Add the figures of one batch. Its predicted tokens go through the heads in parts."""
    # rows [N, H], labels [N]: only positions that predict a token
    rows, labels = _predicted(hidden, inputs["labels"])
    # the first label of a window is never predicted
    tally.windows.extend((inputs["labels"][:, 1:] != MASKED).sum(1).tolist())
    theirs: Tensor | None = None
    their_head: Head | None = None
    if teacher is not None:
        theirs, their_weight, their_bias, transform = teacher.hidden_and_head(inputs)
        theirs, _ = _predicted(theirs, inputs["labels"])
        # cast once per batch, not once per part
        their_head = (their_weight.float(), their_bias, transform)
    # parts: logits of a whole batch at a vocabulary of 256k would need gigabytes
    size = max(1, LOGITS // head[0].shape[0])
    for at in range(0, len(labels), size):
        part = slice(at, at + size)
        # [n, rows of the head], fp32. The model's own head is whole, the teacher's is cut to the shared vocabulary
        their_logits = None if theirs is None or their_head is None else head_logits(theirs[part], their_head)
        sums = evaluation_sums(head_logits(rows[part], head), their_logits, labels[part])
        for kept, figures in (
            (tally.nll, sums.nll),
            (tally.confidence, sums.confidence),
            (tally.correct, sums.correct),
            (tally.kl, sums.kl),
            (tally.top1, sums.top1),
        ):
            if figures is not None:
                # five numbers per token leave the device; the logits do not
                kept.append(figures.float().cpu())


def _predicted(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [N, H] that predict a token, and the predicted tokens [N] (int64). Padding and masked prompts are dropped."""
    rows, targets = shift_for_next_token(hidden, labels)
    wanted = targets != MASKED
    return rows[wanted], targets[wanted]


def head_logits(rows: Tensor, head: Head) -> Tensor:
    """Logits [N, V] of hidden states [N, H] in fp32, whatever the dtype of both."""
    weight, bias, transform = head
    return transform.apply(nn.functional.linear(rows.float(), weight.float(), None if bias is None else bias.float()))


def _result(tally: _Tally) -> EvalResult:
    # fp64 sums: millions of fp32 terms would lose digits
    nll, confidence, correct = (torch.cat(parts).double() for parts in (tally.nll, tally.confidence, tally.correct))
    mean = nll.mean().item()
    kl = torch.cat(tally.kl).double().numpy() if tally.kl else None
    top1 = torch.cat(tally.top1).double().numpy() if tally.top1 else None
    # math.exp overflows above 709
    perplexity = math.exp(mean) if mean < 700 else math.inf
    blocks = block_sums(tally.windows, {"nll": nll.numpy(), "kl": kl, "top1": top1})
    return EvalResult(
        perplexity=perplexity,
        kl=None if kl is None else float(kl.mean()),
        # exact and not from a histogram: all per-token values are at hand
        kl_p99=None if kl is None else float(np.percentile(kl, 99)),
        top1=None if top1 is None else float(top1.mean()),
        ece=calibration_error(confidence, correct),
        tokens=len(nll),
        blocks=blocks,
        **errors_of(blocks, perplexity),
    )


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Expected calibration error: mean over tokens of |accuracy - confidence| of the token's bin; bins are (k/15, (k+1)/15].

    Args:
        confidence: [N], probability of the most likely token.
        correct: [N], 1 where that token is the label, else 0.
    """
    # ceil - 1: bins are closed on the right; confidence 0 falls into the first bin
    bins = (confidence * ECE_BINS).ceil().long().clamp(1, ECE_BINS) - 1
    gaps = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, bins, correct.double() - confidence.double())
    return (gaps.abs().sum() / len(confidence)).item()


@contextmanager
def exact_products(device: str) -> Iterator[None]:
    """Compute matrix products in true fp32 inside the block, without autocast and TF32, whatever training uses."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
