"""Cost of quantizing the teacher: KL(teacher || quantized teacher) on held-out text, measured before training on it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...losses.linear_divergence import TeacherHidden, linear_divergence
from ...losses.settings import LossSettings
from ...losses.shift import shift_for_next_token
from ...models.settings import LoadIn
from ...models.teachers import Teacher

if TYPE_CHECKING:
    from ..data.windows import Windows

DRIFT_TOKENS = 8192
"""Number of held-out tokens for the measurement."""
ROUNDED: tuple[LoadIn, ...] = ("nf4", "int8")
"""Formats in memory that change the predictions of a teacher."""
_BATCH_TOKENS = 2048


@torch.no_grad()
def teacher_drift(exact: Teacher, held: Teacher, windows: "Windows", device: torch.device | str) -> dict[str, Any]:
    """Distance of ``held`` from ``exact``, per token at temperature 1.

    Args:
        exact: The teacher with the weights of its folder, on ``device``.
        held: The same teacher as training holds it, on ``device``.
        windows: Held-out text; the first ``DRIFT_TOKENS`` tokens are used, at least one window.
        device: Device of both.

    Returns:
        ``kl`` (mean KL(exact || held) in nats), ``top1`` (share of positions where both have the same most likely token) and ``tokens``.
    """
    count = min(len(windows), max(1, DRIFT_TOKENS // windows.seq_length))
    size = max(1, _BATCH_TOKENS // windows.seq_length)
    kl = top1 = tokens = 0.0
    for first in range(0, count, size):
        rows = [windows[index] for index in range(first, min(first + size, count))]
        batch = {key: torch.stack([row[key] for row in rows]).to(device) for key in rows[0]}
        reference = TeacherHidden(*_shifted(exact, batch))
        hidden, head, bias, transform = _shifted(held, batch)
        # the shift needs [B, S, H]; the labels stand in for hidden states of width 1
        _, labels = shift_for_next_token(batch["labels"].unsqueeze(-1), batch["labels"])
        # the loss of training itself, with `held` in the place of the student
        sums = linear_divergence(
            hidden, head, reference, labels, LossSettings(), v_eff=exact.v_eff, student_bias=bias, student_transform=transform
        )
        kl += float(sums.kl)
        top1 += float(sums.top1_matches)
        tokens += float(sums.tokens)
    return {"kl": kl / max(tokens, 1), "top1": top1 / max(tokens, 1), "tokens": int(tokens)}


def _shifted(teacher: Teacher, batch: dict[str, Tensor]) -> Any:
    hidden, head, bias, transform = teacher.hidden_and_head(batch)
    return shift_for_next_token(hidden, batch["labels"])[0], head, bias, transform
