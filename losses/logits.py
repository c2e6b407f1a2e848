"""Turns logits into log-probabilities, with the precision, temperature and checks that all divergences share."""

import torch
from torch import Tensor

FLOOR = -1e30
"""Finite value used for log 0: its exp is 0, and the difference of two such logarithms is 0 instead of NaN."""


def in_full_precision(tensor: Tensor) -> Tensor:
    """Returns fp64 tensors as they are and all others in fp32."""
    # law 2, docs/architecture.md: the softmax is fp32, also for bf16 logits
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def log_distributions(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns (log q, log p): log-softmax of student and teacher at a temperature, fp32 (fp64 for fp64), at least ``FLOOR``.

    Raises:
        ValueError: shapes differ, or temperature is not positive.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits of shape {tuple(student_logits.shape)} and teacher logits of shape {tuple(teacher_logits.shape)} must be "
            "equal in shape; slice both to the real vocabulary when one is padded"
        )
    checked_temperature(temperature)
    student, teacher = in_full_precision(student_logits), in_full_precision(teacher_logits)
    log_q, log_p = torch.log_softmax(student / temperature, -1), torch.log_softmax(teacher / temperature, -1)
    # log 0 becomes FLOOR: -inf - (-inf) in log p - log q would be NaN
    return log_q.clamp(min=FLOOR), log_p.clamp(min=FLOOR)


def checked_temperature(temperature: float) -> float:
    """Returns the temperature; raises ValueError if it is not positive."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be greater than 0; 1.0 leaves the logits as they are")
    return temperature


def checked_share(name: str, value: float, ends: str) -> float:
    """Returns ``value`` if it is strictly between 0 and 1; else raises ValueError with the advice ``ends`` for 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name}={value} must lie strictly between 0 and 1; {ends}")
    return value
