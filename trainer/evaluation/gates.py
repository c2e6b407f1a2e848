"""Stage `evaluate`: compare the figures of the run with its gates."""

from collections.abc import Mapping
from typing import Any

from ..settings import EvaluateSettings
from .spread import is_clear


def gate_failures(
    settings: EvaluateSettings, model: dict[str, Any], teacher: dict[str, Any] | None, *, increase_se: float | None = None
) -> list[str]:
    """One sentence for each gate that is not met; [] when all are met.

    A gate is judged by the figure itself. Where chance could explain that it is missed, the sentence says so.

    Args:
        settings: The gates.
        model: Figures of the evaluated model: ``perplexity``, ``kl`` in nats, ``top1`` as a share; ``kl_se`` and ``top1_se`` if known.
        teacher: Figures of the teacher; None without a teacher, which skips the perplexity gate.
        increase_se: Standard error of perplexity(model) / perplexity(teacher), if known.
    """
    failed = []
    if settings.max_perplexity_increase is not None and teacher is not None:
        increase = model["perplexity"] / teacher["perplexity"] - 1
        # not <=: NaN fails the gate, where > would let it pass
        if not increase <= settings.max_perplexity_increase:
            moved = f"fell by {_percent(-increase)}" if increase < 0 else f"rose by {_percent(increase)}"
            allowed = f"{settings.max_perplexity_increase * 100:.6g}%"
            doubt = _doubt(increase - settings.max_perplexity_increase, increase_se, ".2%")
            failed.append(f"perplexity {moved}, allowed is max_perplexity_increase={allowed}{doubt}")
    if settings.max_kl is not None and model["kl"] is not None and not model["kl"] <= settings.max_kl:
        doubt = _doubt(model["kl"] - settings.max_kl, model.get("kl_se"), ".4f")
        failed.append(f"KL to the teacher is {model['kl']:.4f} nats, allowed is max_kl={settings.max_kl:g}{doubt}")
    if settings.min_top1 is not None and model["top1"] is not None and not model["top1"] >= settings.min_top1:
        doubt = _doubt(model["top1"] - settings.min_top1, model.get("top1_se"), ".2%")
        failed.append(f"top-1 agreement is {model['top1'] * 100:.5g}%, wanted is min_top1={settings.min_top1 * 100:.6g}%{doubt}")
    return failed


def task_failures(
    gates: Mapping[str, float] | None, model: Mapping[str, dict[str, Any]], teacher: Mapping[str, dict[str, Any]] | None
) -> list[str]:
    """One sentence for each task whose score is too low; [] when all are met, or without a teacher.

    Args:
        gates: Smallest allowed score of a task, as a share of the teacher's; None = no gates.
        model: Scores of the evaluated model by task (``tasks.TaskScore`` as plain data).
        teacher: Scores of the teacher; None without one.
    """
    failed = []
    for task, share in (gates or {}).items():
        if teacher is None:
            continue
        own, theirs = model[task], teacher[task]
        if not own["higher_is_better"]:
            failed.append(f"task {task}: less is better for {own['metric']}, so min_task={share * 100:.6g}% cannot be judged")
        elif not own["score"] >= share * theirs["score"]:
            doubt = _doubt(own["score"] - share * theirs["score"], own["stderr"], ".2%", "task_limit")
            reached = f"{own['score']:.4g} is {own['score'] / theirs['score']:.1%} of the teacher's {theirs['score']:.4g}"
            failed.append(f"task {task}: {own['metric']} {reached}, wanted is min_task={share * 100:.6g}%{doubt}")
    return failed


def _doubt(missed_by: float, error: float | None, form: str, more: str = "data.eval_tokens") -> str:
    """What to say of a gate that is missed by no more than chance explains; '' otherwise."""
    if is_clear(missed_by, error) is not False:
        return ""
    return f" (the standard error is {error:{form}}: too little was measured to tell; a larger {more} lowers it)"


def _percent(share: float) -> str:
    """Percentage with enough digits to tell a small share from zero: 3.1%, 0.014%."""
    return f"{share:.1%}" if not abs(share) < 0.01 else f"{share * 100:.2g}%"
