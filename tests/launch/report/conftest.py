"""A report with every kind of row in it."""

from typing import Any

import pytest

AGREES = {"status": "agrees", "top1": 1.0, "max_logprob_diff": 1e-6, "positions": 128}


def row(name: str, kind: str, **more: Any) -> dict[str, Any]:
    base = {"name": name, "kind": kind, "path": name, "parameters": 2_500_000, "bytes": 5_000_000, "bits_per_weight": 16.0, "sparsity": 0.0}
    measured = {"perplexity": 10.0, "kl": 0.25, "kl_p99": 2.0, "top1": 0.75, "ece": 0.02}
    return {**base, "tokens": 0, "seconds": 0.0, "eval": measured, "layer_sparsity": [0.0, 0.0], **more}


@pytest.fixture
def report() -> dict[str, Any]:
    export = row("x", "export", format="compressed-tensors", exact=True, tokens_per_second=None, bytes=1_400_000, bits_per_weight=4.48)
    return {
        "name": "a <b>bold</b> name",
        "version": "0.1.0",
        "commit": "abc",
        "versions": {"packages": {"decoct": "0.1.0", "torch": "2.13.0"}, "python": "3.11", "cpu": "a CPU", "cores": 2, "gpus": []},
        "protocol": {"text": "some text", "text_hash": "0123456789abcdef", "context": 64, "tokens": 640, "dtype": "float32"},
        "stages": [
            row("teacher", "teacher", change=None),
            row("00-student", "student", change={"since": "teacher", "perplexity": 1.5, "kl": 0.25}),
            row("01-distill", "distill", tokens=1_000_000, seconds=75.0, change={"since": "00-student", "perplexity": -0.125, "kl": -0.1}),
            row("02-prune", "prune", sparsity=0.3, layer_sparsity=[0.2, 0.4]),
            row("03-qat", "qat", bytes=10_000_000, bits_per_weight=32.0, packed_bytes=1_390_000, packed_bits_per_weight=4.45),
            {**row("04-export", "export"), "eval": None},
        ],
        "baselines": [row("teacher rounded to int4", "quantize", bytes=1_500_000)],
        "exports": [
            {**export, "runtimes": {"transformers": {"status": "agrees", "top1": 1.0, "max_logprob_diff": 1e-6, "positions": 128}}}
        ],
        "notes": ["01-distill ends worse on held-out text than it began: <kl>"],
        "recipe": {"name": "x"},
    }
