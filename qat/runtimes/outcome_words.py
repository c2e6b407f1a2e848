"""Describes a runtime's entry in one line for the console and the report."""

import math
from typing import Any

_STATUS = {
    "agrees": "loads it and agrees with the model that was trained",
    "differs": "loads it and does NOT agree with the model that was trained",
    "failed": "did NOT run it",
    "skipped": "was not compared",
    "not installed": "was not checked, because it is not installed here",
}


def outcome_text(seen: dict[str, Any]) -> str:
    """Return a sentence about a runtime's entry from ``check_runtimes``, for example

    'loads it and agrees with the model that was trained: the same token at 100.00% of 128 positions, ...; transformers 5.17.0'
    """
    figures = ", ".join(_figures(seen))
    status = _STATUS.get(seen["status"], str(seen["status"]))
    parts = [f"{status}: {figures}" if figures else status]
    parts += [seen["reason"]] if seen.get("reason") else []
    parts += [speed] if (speed := _speed(seen)) else []
    parts += [seen["version"]] if seen.get("version") else []
    return "; ".join(parts)


def _figures(seen: dict[str, Any]) -> list[str]:
    found = []
    if seen.get("top1") is not None:
        positions = f" of {seen['positions']:,} positions" if seen.get("positions") else " of the positions"
        found.append(f"the same token at {seen['top1']:.2%}{positions}")
    if (difference := seen.get("max_logprob_diff")) is not None:
        found.append("log-probabilities that are NaN" if math.isnan(difference) else f"log-probabilities within {difference:.1g} nats")
    if (perplexity := seen.get("perplexity")) is not None:
        found.append(f"perplexity {perplexity:.3f}")
    if arithmetic := seen.get("arithmetic"):
        found.append("in its own arithmetic" if arithmetic == "own" else f"in {arithmetic}")
    return found


def _speed(seen: dict[str, Any]) -> str:
    if not seen.get("tokens_per_second"):
        return ""
    memory = f", peak memory {seen['peak_bytes'] / 1e6:,.0f} MB" if seen.get("peak_bytes") else ""
    return f"{seen['tokens_per_second']:,.0f} tokens/s{memory}"
