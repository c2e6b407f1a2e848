"""Stage `evaluate`: compare the figures of the run with its gates."""

from typing import Any

from ..settings import EvaluateSettings


def gate_failures(settings: EvaluateSettings, model: dict[str, Any], teacher: dict[str, Any] | None) -> list[str]:
    """One sentence for each gate that is not met; [] when all are met.

    Args:
        settings: The gates.
        model: Figures of the evaluated model: ``perplexity``, ``kl`` in nats, ``top1`` as a share.
        teacher: Figures of the teacher; None without a teacher, which skips the perplexity gate.
    """
    failed = []
    if settings.max_perplexity_increase is not None and teacher is not None:
        increase = model["perplexity"] / teacher["perplexity"] - 1
        # not <=: NaN fails the gate, where > would let it pass
        if not increase <= settings.max_perplexity_increase:
            moved = f"fell by {_percent(-increase)}" if increase < 0 else f"rose by {_percent(increase)}"
            allowed = f"{settings.max_perplexity_increase * 100:.6g}%"
            failed.append(f"perplexity {moved}, allowed is max_perplexity_increase={allowed}")
    if settings.max_kl is not None and model["kl"] is not None and not model["kl"] <= settings.max_kl:
        failed.append(f"KL to the teacher is {model['kl']:.4f} nats, allowed is max_kl={settings.max_kl:g}")
    if settings.min_top1 is not None and model["top1"] is not None and not model["top1"] >= settings.min_top1:
        failed.append(f"top-1 agreement is {model['top1'] * 100:.5g}%, wanted is min_top1={settings.min_top1 * 100:.6g}%")
    return failed


def _percent(share: float) -> str:
    """Percentage with enough digits to tell a small share from zero: 3.1%, 0.014%."""
    return f"{share:.1%}" if not abs(share) < 0.01 else f"{share * 100:.2g}%"
