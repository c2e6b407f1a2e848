"""Dense form of linear_divergence in plain differentiable PyTorch. It holds [N, V] logits and is the specification of the other forms."""

import torch
from torch import Tensor

from ..choice import chosen_divergence
from ..divergences import cross_entropy, forward_kl, teacher_entropy
from ..sparse import SparseTargets, sparse_forward_kl
from ..sums import LossSums
from .inputs import HiddenStates, LogitTransform, Problem, TeacherLogits


def reference_sums(problem: Problem) -> LossSums:
    """Computes the sums of ``problem`` by the formulas of ``divergences``; gradients come from autograd."""
    with torch.autocast(problem.labels.device.type, enabled=False):
        # law 2, docs/architecture.md: autocast, switched off here, would compute the product in bf16
        logits = _logits(problem.student, problem)
        labels = problem.labels[problem.kept]
        hard = cross_entropy(logits, labels)
        zero = logits.new_zeros(())
        if problem.teacher is None:
            kl = entropy = zero
            # top-1 matches are then those with the label
            loss, target = hard, labels
        elif isinstance(problem.teacher, SparseTargets):
            targets = problem.teacher[problem.kept]
            soft = sparse_forward_kl(logits, targets)
            loss = _together(soft, hard, problem)
            kl, entropy, target = soft.detach().sum(), targets.entropy.to(logits.dtype).sum(), targets.best
        else:
            teacher_logits = _logits(problem.teacher, problem)
            loss = _mixed(logits, teacher_logits, hard, problem)
            # figures of the report, at temperature 1 and without a graph
            kl = forward_kl(logits.detach(), teacher_logits).sum()
            entropy = teacher_entropy(teacher_logits).sum()
            target = teacher_logits.argmax(-1)
        best = logits.detach()
        # >= and not argmax: ties count as matches
        matches = best.gather(1, target.unsqueeze(1)).squeeze(1) >= best.amax(-1)
        return LossSums(
            loss=loss.sum(),
            tokens=torch.tensor(len(labels), device=labels.device),
            kl=kl,
            cross_entropy=hard.detach().sum(),
            teacher_entropy=entropy,
            top1_matches=matches.sum(),
            covered_mass=problem.covered_mass(),
        )


def _mixed(logits: Tensor, teacher_logits: Tensor, hard: Tensor, problem: Problem) -> Tensor:
    if problem.settings.hard_weight == 1:
        return hard
    return _together(chosen_divergence(logits, teacher_logits, problem.settings), hard, problem)


def _together(soft: Tensor, hard: Tensor, problem: Problem) -> Tensor:
    """Loss per token [n]. A term of weight 0 is left out: 0 times an infinite term would be NaN."""
    weight = problem.settings.hard_weight
    if weight == 1:
        return hard
    soft = problem.settings.scale * soft
    return soft if weight == 0 else soft + weight * hard


def _logits(states: HiddenStates | TeacherLogits, problem: Problem) -> Tensor:
    """Final logits [n, V] of the unmasked rows, in the problem's dtype."""
    v_eff, dtype, kept = problem.v_eff, problem.dtype, problem.kept
    if isinstance(states, TeacherLogits):
        return states.logits[kept, :v_eff].to(dtype)
    # [n, H] @ [H, V]
    logits = states.hidden[kept].to(dtype) @ states.head[:v_eff].to(dtype).T
    if states.bias is not None:
        logits = logits + states.bias[:v_eff].to(dtype)
    return _transformed(logits, states.transform)


def _transformed(logits: Tensor, transform: LogitTransform | None) -> Tensor:
    if transform is None:
        return logits
    logits = logits * transform.logit_scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)
