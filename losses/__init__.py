"""Distillation losses: divergences per token, and `linear_divergence`, which never holds all logits. Needs only torch."""

from typing import TYPE_CHECKING

from .. import lazy_names

if TYPE_CHECKING:
    from .choice import FUNCTIONS as FUNCTIONS
    from .choice import chosen_divergence as chosen_divergence
    from .divergences import adaptive_kl as adaptive_kl
    from .divergences import cross_entropy as cross_entropy
    from .divergences import forward_kl as forward_kl
    from .divergences import reverse_kl as reverse_kl
    from .divergences import symmetric_kl as symmetric_kl
    from .divergences import teacher_entropy as teacher_entropy
    from .divergences import total_variation as total_variation
    from .evaluation import evaluation_sums as evaluation_sums
    from .linear_divergence import TeacherHidden as TeacherHidden
    from .linear_divergence import TeacherLogits as TeacherLogits
    from .mixtures import gkd_jsd as gkd_jsd
    from .mixtures import jsd as jsd
    from .mixtures import skew_forward_kl as skew_forward_kl
    from .mixtures import skew_reverse_kl as skew_reverse_kl
    from .settings import DIVERGENCES as DIVERGENCES
    from .settings import LossSettings as LossSettings
    from .shift import MASKED as MASKED
    from .shift import shift_for_next_token as shift_for_next_token
    from .sparse import SparseTargets as SparseTargets
    from .sparse import sparse_forward_kl as sparse_forward_kl
    from .sums import LossSums as LossSums

__getattr__, __dir__ = lazy_names(__name__)
