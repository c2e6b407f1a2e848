"""linear_divergence computes the distillation loss from hidden states and heads without holding all logits.

It imports nothing but torch, so any training loop can use it. ``reference.py`` is the specification, dense and differentiable by
autograd; ``chunked.py`` gives the same sums and gradients for one block of rows after another, in plain PyTorch (``slopes.py`` has the
derivatives); ``fused.py`` does the same with a Triton kernel between the matrix products.
"""

from typing import Literal

from torch import Tensor

from ..settings import LossSettings
from ..sparse import SparseTargets as SparseTargets
from ..sums import LossSums
from .chunked import chunked_sums
from .fused import can_fuse, fused_sums
from .inputs import HiddenStates as HiddenStates
from .inputs import LogitTransform as LogitTransform
from .inputs import TeacherHidden as TeacherHidden
from .inputs import TeacherLogits as TeacherLogits
from .inputs import TeacherLogitsSource as TeacherLogitsSource
from .inputs import checked_problem
from .reference import reference_sums

Backend = Literal["auto", "reference", "chunked", "triton"]
_BACKENDS = {"reference": reference_sums, "chunked": chunked_sums, "triton": fused_sums}


def linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher: TeacherLogitsSource | None,
    labels: Tensor,
    settings: LossSettings,
    *,
    v_eff: int,
    student_bias: Tensor | None = None,
    student_transform: LogitTransform | None = None,
    backend: Backend = "auto",
) -> LossSums:
    """``(1 - hard_weight) * T^2 * D(teacher, student) + hard_weight * cross-entropy``, summed over the unmasked tokens.

    Heads are cut to ``v_eff`` rows before the product. Products and softmax are fp32 for every dtype of the inputs, also under autocast
    (fp64 when the student is fp64); ``torch.set_float32_matmul_precision`` still decides whether fp32 products may use TF32.
    Gradients flow to the student's hidden states, head and bias, never to the teacher; each has its tensor's dtype.

    A bias or teacher logit of -inf is a token of probability 0 (``divergences`` lists the divergences that it makes infinite). In fp32
    the loss and ``kl`` have rounding noise of about 1e-7 nats per token in all back ends but the reference; use ``divergences`` to
    measure smaller values. The gradient is a difference of probabilities, accurate to about 1e-6 of them.

    Args:
        student_hidden: [N, H], last hidden states; row i predicts ``labels[i]``, so shift first (``shift_for_next_token``).
        student_head: [V_padded, H] output embedding with at least ``v_eff`` rows; may be tied to the input embedding.
        teacher: ``TeacherHidden`` (H may differ), ``TeacherLogits`` or ``SparseTargets`` (only forward KL), N rows; None = only
            cross-entropy.
        labels: [N] int64 in [0, v_eff); -100 = masked, and neither product nor loss is computed for the row.
        settings: Divergence, temperature, weights.
        v_eff: Number of tokens in the real vocabulary (V without padding).
        student_bias: [V_padded] bias of the head, or None.
        student_transform: Scale and soft cap of the student's logits, or None.
        backend: "auto" takes "triton" on a GPU and "chunked" elsewhere; "reference" holds all logits.

    Returns:
        0-dim sums; ``loss`` is 0 with a graph when every token is masked.

    Raises:
        ValueError: shapes, vocabulary or labels do not fit, hard_weight is below 1 without a teacher, or the back end is unknown or
            cannot run here.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2 (the mixture and T^2).
    """
    if backend != "auto" and backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of auto, {', '.join(_BACKENDS)}")
    student = HiddenStates(student_hidden, student_head, student_bias, student_transform)
    problem = checked_problem(student, teacher, labels, settings, v_eff)
    if backend == "auto":
        backend = "triton" if can_fuse(problem) else "chunked"
    return _BACKENDS[backend](problem)
