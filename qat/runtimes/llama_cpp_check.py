"""What llama.cpp makes of a GGUF export, compared with the model that the independent reader rebuilds.

llama.cpp multiplies with activations of 8 bits (or in half precision), so its logits are near the fake-quant model's, not equal. The
rule is that of ``agreement.py``, with perplexities within 0.5 %.
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...models.folder.structure import model_structure
from ..readers.gguf_model import GgufModel, find_gguf
from ..rebuild import load_exported_model
from ..runtimes import llama_cpp_process as llama_cpp_check
from .agreement import compare
from .check import available_bytes, chosen_tokens
from .judge_process import outcome, run_check, unfinished

MAX_PERPLEXITY_SHIFT = 0.005
"""Relative difference of the perplexities, over at least 2,000 positions."""
PACKAGE = "xllamacpp"


def check_llama_cpp(path: Path, tokens: Tensor | None, python: str | None = None) -> dict[str, Any]:
    """Load a GGUF export (a folder with config.json) in llama.cpp, in a fresh process, and compare; see ``check_runtimes``.

    ``python`` is an interpreter that has the package, None for the one that runs.
    """
    file = find_gguf(path)
    assert file is not None, path
    if python is None and importlib.util.find_spec(PACKAGE) is None:
        return outcome("not installed", reason=f"pip install {PACKAGE} to have the file loaded in llama.cpp and compared")
    folder = file.parent
    needed, free = 5 * model_structure(folder).parameters, available_bytes()
    if free is not None and needed > free:
        return outcome("skipped", reason=f"rebuilding in fp32 needs about {needed:,} bytes of memory, {free:,} are free")
    context = GgufModel(path).number("context_length")
    chosen = chosen_tokens(folder, tokens)[:, :context]
    model = load_exported_model(path)
    with torch.inference_mode():
        reference = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in chosen])
    del model
    with tempfile.TemporaryDirectory(prefix="decoct-verify-") as scratch:
        result, seen = run_llama_cpp(file, chosen, reference.shape[-1], Path(scratch), python or sys.executable)
    if seen is None:
        return result
    agreement = compare(reference, seen, chosen)
    problem = agreement.problem(MAX_PERPLEXITY_SHIFT)
    return outcome(
        "differs" if problem else "agrees",
        top1=agreement.top1,
        max_logprob_diff=agreement.max_logprob_diff,
        perplexity=None if tokens is None else agreement.perplexity,
        positions=agreement.positions,
        reason=problem,
        **result,
    )


def run_llama_cpp(
    file: Path, tokens: Tensor, vocabulary: int, scratch: Path, python: str
) -> tuple[dict[str, Any], dict[str, NDArray[Any]] | None]:
    """(version, speed and memory; what it predicted), or (an outcome, None) when it did not get that far."""
    places = {"tokens": scratch / "tokens.npy", "seen": scratch / "seen.npz", "result": scratch / "result.json"}
    np.save(places["tokens"], tokens.numpy())
    # -P: no module of the folder that the script is in is taken for an installed one
    command = [python, "-P", llama_cpp_check.__file__, str(file.resolve()), "--threads", str(torch.get_num_threads())]
    command += ["--vocabulary", str(vocabulary), *(part for name, place in places.items() for part in (f"--{name}", str(place)))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = run_check(command, places["result"], environment)
    if not ended.done:
        return unfinished(ended), None
    with np.load(places["seen"], allow_pickle=False) as arrays:
        return {key: value for key, value in ended.result.items() if key != "phase"}, dict(arrays)
