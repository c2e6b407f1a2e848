"""A runtime's entry in records and reports: what it made of an export."""

from typing import Any

from .agreement import Agreement


def outcome(status: str, **facts: Any) -> dict[str, Any]:
    """Every usual key, None where there is nothing to say, and ``facts``."""
    return {"status": status, **dict.fromkeys(("top1", "max_logprob_diff", "perplexity", "version", "positions", "reason")), **facts}


def verdict(agreement: Agreement, problem: str | None, *, real_text: bool, **facts: Any) -> dict[str, Any]:
    """The entry of a runtime that answered.

    Args:
        agreement: What it computes, compared.
        problem: ``agreement.problem(...)``.
        real_text: Whether the tokens were text, so that a perplexity means something.
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
