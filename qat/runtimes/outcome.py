"""A runtime's entry in records and reports."""

from typing import Any

from .agreement import Agreement


def outcome(status: str, **facts: Any) -> dict[str, Any]:
    """Return an entry with all usual keys, None where unknown, and ``facts``."""
    return {"status": status, **dict.fromkeys(("top1", "max_logprob_diff", "perplexity", "version", "positions", "reason")), **facts}


def verdict(agreement: Agreement, problem: str | None, *, real_text: bool, **facts: Any) -> dict[str, Any]:
    """Return the entry of a runtime that answered.

    Args:
        agreement: Comparison of its answer.
        problem: Result of ``agreement.problem``.
        real_text: Whether the tokens are text, so that a perplexity is meaningful.
        facts: Further entries.
    """
    return outcome(
        "differs" if problem else "agrees",
        top1=agreement.top1,
        max_logprob_diff=agreement.max_logprob_diff,
        perplexity=agreement.perplexity if real_text else None,
        positions=agreement.positions,
        **facts,
        reason=problem,
    )
