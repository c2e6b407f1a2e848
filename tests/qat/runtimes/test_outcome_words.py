"""Outcomes of runtimes are sentences; nothing of a dictionary is left in them."""

from typing import Any

import pytest

from decoct.qat.runtimes.outcome import outcome
from decoct.qat.runtimes.outcome_words import outcome_text

FACTS: dict[str, Any] = {"top1": 0.9984, "positions": 4096, "max_logprob_diff": 3.2e-7, "perplexity": 102.956, "version": "vLLM 0.12"}


def test_agreement_is_a_sentence_with_its_figures() -> None:
    seen = outcome("agrees", **FACTS, arithmetic="own", tokens_per_second=1234.5, peak_bytes=512_000_000)
    assert outcome_text(seen) == (
        "loads it and agrees with the model that was trained: the same token at 99.84% of 4,096 positions, log-probabilities within 3e-07 "
        "nats, perplexity 102.956, in its own arithmetic; 1,234 tokens/s, peak memory 512 MB; vLLM 0.12"
    )


@pytest.mark.parametrize(
    ("seen", "text"),
    [
        (outcome("not installed", reason="pip install x"), "was not checked, because it is not installed here; pip install x"),
        (outcome("skipped", reason="it refuses 3 bits"), "was not compared; it refuses 3 bits"),
        (outcome("failed", reason="exit code 1: boom", version="v 1"), "did NOT run it; exit code 1: boom; v 1"),
        (
            outcome("differs", top1=0.5, max_logprob_diff=float("nan"), reason="logits differ"),
            "loads it and does NOT agree with the model that was trained: the same token at 50.00% of the positions, log-probabilities "
            "that are NaN; logits differ",
        ),
        ({"status": "something new"}, "something new"),
    ],
)
def test_every_outcome_has_words(seen: dict[str, Any], text: str) -> None:
    assert outcome_text(seen) == text
