"""The Cholesky factor of a Hessian, by which a change of one weight is compensated for by the weights that are worked on after it.

For one row w of a weight and H = 2/N sum x x^T, the error (w - q) H (w - q)^T is smallest when column k is chosen after

    v_k = w_k + sum_{i < k} (w_i - q_i) R_ik / R_kk

R is upper triangular with H = R R^T: the Cholesky factor of H with rows and columns reversed. It is the inverse of the factor of the
inverse of H that the papers use (Frantar et al., arXiv 2210.17323 and 2301.00774), so H is never inverted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """The factorized Hessian, which all weights with the same inputs share."""

    order: Tensor
    """int64 [in]: the columns in the order in which they are worked on."""
    links: Tensor
    """fp32 [in, in] in that order, only the lower triangle is used: ``links[k, i]`` = R_ik / R_kk."""
    damping: float
    """Share of the mean diagonal that was added to the diagonal: the requested one, or more if that was not enough."""
    pivots: Tensor
    """fp32 [in] in that order: R_kk^2, the weight of the error of column k that no later column compensates for; 0 for an input that
    was always zero and is not damped."""


def damping_steps(damping: float) -> list[float]:
    """The dampings to try: the requested one, then ten times the one before (at least 0.001), up to 1."""
    steps = [damping]
    while (following := max(10 * steps[-1], 1e-3)) <= 1.0:
        steps.append(following)
    return steps


@torch.no_grad()
def factorize(hessian: Tensor, damping: float = 0.01, activation_order: bool = True) -> Factor | None:
    """Factorizes a Hessian for ``gptq_pass`` and ``sparsegpt``.

    Args:
        hessian: fp32 [in, in], finite; not changed. An input that was always zero has a zero row and column: its weights
            compensate for nothing.
        damping: Share of the mean diagonal added to the diagonal; raised by ``damping_steps`` until the Cholesky factor exists.
        activation_order: True takes the columns with the largest diagonal first (of equal ones the leftmost); False goes from left to
            right.

    Returns:
        The factor, or None if no damping makes the matrix positive definite.
    """
    diagonal = hessian.diagonal()
    natural = torch.arange(len(diagonal), device=hessian.device)
    order = torch.sort(diagonal, descending=True, stable=True).indices if activation_order else natural
    # the lower factor of the reversed matrix, reversed back, is the upper factor R with H = R R^T
    last_first = order.flip(0)
    mean = diagonal.mean()
    for share in damping_steps(damping):
        matrix = hessian[last_first.unsqueeze(1), last_first]
        damped = matrix.diagonal().add_(share * mean)
        # an input that was always zero would make the matrix singular; with a 1 its row and column of the factor stay zero elsewhere
        silent = damped == 0
        damped.masked_fill_(silent, 1.0)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        # cholesky_ex may succeed on a pivot that is only rounding error; what it divides by that pivot may then be infinite
        if not int(failed) and bool(torch.isfinite(lower).all()):
            # R^T, then each row k divided by R_kk
            links = lower.flip(0, 1).T.contiguous()
            pivots = links.diagonal().clone()
            links.div_(pivots.unsqueeze(1))
            return Factor(order=order, links=links, damping=share, pivots=pivots.square_().masked_fill_(silent.flip(0), 0.0))
    return None
