"""What installed runtimes make of an export, compared with the model that the independent reader rebuilds.

Each runtime loads the export in a fresh process (``judge_process.py``); ``agreement.py`` says when it computes what was trained.
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
    """Load an export in every runtime that can be had here, and compare.

    Args:
        folder: The export.
        tokens: int64 [B, S] of real text, to have perplexities too; None takes 128 pseudo-random tokens.

    Returns:
        By runtime: ``status``, ``top1``, ``max_logprob_diff`` (nats), ``perplexity`` (None without ``tokens``), ``version``, ``positions``
        and, when it did not agree, ``reason``. The status is 'agrees'; 'differs': it loaded the export and computes something else, the
        only one that speaks against the export; 'failed': it loaded it and ended while it predicted; 'skipped': it refused to load it
        (in the reason its own words), or there is too little memory to compare; or 'not installed'.
        ``arithmetic`` 'own' (of vLLM the dtype) where predictions were compared, not logits. Of a model that was loaded also
        ``tokens_per_second`` of generating one text and ``peak_bytes``, the most memory that its processes had.

    Raises:
        UserError: the export cannot be rebuilt, or ``tokens`` do not fit its vocabulary.
    """
    if find_gguf(folder) is not None:
        return {"llama.cpp": check_llama_cpp(Path(folder), tokens)}
    reference = Reference(Path(folder), tokens)
    return {"transformers": check_transformers(reference), "vLLM": check_vllm(reference)}
