"""Maps the name of a divergence in a recipe to its function, decoct's or the user's."""

from collections.abc import Callable, Mapping

from torch import Tensor

from .divergences import adaptive_kl, forward_kl, reverse_kl, symmetric_kl, total_variation
from .mixtures import gkd_jsd, jsd, skew_forward_kl, skew_reverse_kl
from .own import own_divergence
from .settings import Divergence, LossSettings
from .settings_own import OwnLossSettings

FUNCTIONS: Mapping[Divergence, tuple[Callable[..., Tensor], str | None]] = {
    "forward_kl": (forward_kl, None),
    "reverse_kl": (reverse_kl, None),
    "jsd": (jsd, "beta"),
    "gkd_jsd": (gkd_jsd, "beta"),
    "skew_forward_kl": (skew_forward_kl, "alpha"),
    "skew_reverse_kl": (skew_reverse_kl, "alpha"),
    "adaptive_kl": (adaptive_kl, "head_mass"),
    "symmetric_kl": (symmetric_kl, "balance"),
    "total_variation": (total_variation, None),
}
"""Name -> (function, the field of ``LossSettings`` that only this divergence has, or None)."""


def chosen_divergence(student_logits: Tensor, teacher_logits: Tensor, settings: LossSettings) -> Tensor:
    """Divergence per token that ``settings`` names, at its temperature, not multiplied by T^2.

    Arguments and result as for ``forward_kl``. ``settings.hard_weight`` must be below 1: at 1 the settings have no temperature.
    """
    if isinstance(settings, OwnLossSettings):
        return own_divergence(student_logits, teacher_logits, settings)
    function, dial = FUNCTIONS[settings.divergence]
    # at most one parameter: LossSettings has refused those of other divergences
    dials = {} if dial is None else {dial: getattr(settings, dial)}
    return function(student_logits, teacher_logits, temperature=settings.temperature, **dials)
