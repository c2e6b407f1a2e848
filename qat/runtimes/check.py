"""Loads an export in installed runtimes and compares them with the model that the independent reader rebuilds.

Each runtime loads the export in a fresh process (``judge_process.py``); ``agreement.py`` has the rule for agreement.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from ..readers.gguf_model import find_gguf
from .llama_cpp_check import check_llama_cpp
from .reference import Reference
from .transformers_check import check_transformers
from .vllm_check import check_vllm


def check_runtimes(folder: Path, *, tokens: Tensor | None = None) -> dict[str, dict[str, Any]]:
    """Load an export in every installed runtime and compare.

    Args:
        folder: The export.
        tokens: int64 [B, S], real text, which adds perplexities; None takes 128 pseudo-random tokens.

    Returns:
        By runtime: ``status``, ``top1``, ``max_logprob_diff`` (nats), ``perplexity`` (None without ``tokens``), ``version``, ``positions``
        and, when it did not agree, ``reason``. The status is 'agrees'; 'differs': it loaded the export and computes something else,
        the only status that counts against the export; 'failed': it loaded the export and died while predicting; 'skipped': it refused to
        load the export (``reason`` has its message), or memory is too small to compare; or 'not installed'. ``arithmetic`` is 'own' (for
        vLLM the dtype) if predictions were compared instead of logits. For a loaded model also ``tokens_per_second`` of generating one
        text and ``peak_bytes``, the peak memory of its processes.

    Raises:
        UserError: the export cannot be rebuilt, or ``tokens`` do not fit its vocabulary.
    """
    if find_gguf(folder) is not None:
        return {"llama.cpp": check_llama_cpp(Path(folder), tokens)}
    reference = Reference(Path(folder), tokens)
    return {"transformers": check_transformers(reference), "vLLM": check_vllm(reference)}
