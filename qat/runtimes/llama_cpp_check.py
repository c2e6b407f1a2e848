"""Loads a GGUF export in llama.cpp and compares it with the model that the independent reader rebuilds.

llama.cpp rounds activations to 8 bits (or computes in half precision), so its logits are close to the fake-quant model's but not equal:
predictions are compared (``agreement.py``).
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from ..readers.gguf_model import GgufModel, find_gguf
from . import llama_cpp_process
from .agreement import MAX_PERPLEXITY_SHIFT, compare_predictions
from .judge_process import run_judge
from .outcome import outcome, verdict
from .reference import Reference

PACKAGE = "xllamacpp"


def check_llama_cpp(path: Path, tokens: Tensor | None, python: str | None = None) -> dict[str, Any]:
    """Load a GGUF export (a folder with config.json) in llama.cpp, in a fresh process, and compare; see ``check_runtimes``.

    ``python`` is an interpreter that has the package; None: the running one.
    """
    file = find_gguf(path)
    assert file is not None, path
    if python is None and importlib.util.find_spec(PACKAGE) is None:
        return outcome("not installed", reason=f"pip install {PACKAGE} to have the file loaded in llama.cpp and compared")
    reference = Reference(file, tokens, GgufModel(file).number("context_length"))
    if skipped := reference.too_large():
        return skipped
    # the reference first: it also gives the size of the vocabulary
    logits = reference.logits()
    facts, seen = run_llama_cpp(file, reference.tokens, logits.shape[-1], python or sys.executable)
    if seen is None:
        return facts
    agreement = compare_predictions(logits, seen, reference.tokens)
    return verdict(agreement, agreement.problem(MAX_PERPLEXITY_SHIFT["llama.cpp"]), real_text=reference.real_text, **facts)


def run_llama_cpp(file: Path, tokens: Tensor, vocabulary: int, python: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]] | None]:
    """Return (version, speed and memory; its predictions), or (an outcome, None) if it did not answer."""
    # on the CPU, also where the package was built for a GPU
    return run_judge(python, [llama_cpp_process.__file__], file, tokens, {"CUDA_VISIBLE_DEVICES": ""}, vocabulary=vocabulary)
