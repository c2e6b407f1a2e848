"""What llama.cpp makes of a GGUF export, compared with the model that the independent reader rebuilds.

llama.cpp multiplies with activations of 8 bits (or in half precision), so its logits are near the fake-quant model's, not equal. The
rule: the same token wherever the fake-quant model's first choice leads by more than 0.1 nat; over at least 2,000 positions of real
text also at 99 % of all positions, and a perplexity within 0.5 %.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .read_gguf_model import GgufModel, find_gguf
from .rebuild import load_exported_model
from .runtimes import TIMEOUT_SECONDS, available_bytes, chosen_tokens, outcome
from .structure import model_structure

MARGIN = 0.1
"""Nats between the first and the second choice above which both must choose the same."""
MIN_TOP1, MAX_PERPLEXITY_SHIFT, MIN_POSITIONS = 0.99, 0.005, 2000
PACKAGE = "xllamacpp"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A runtime beside the fake-quant model, over the same tokens."""

    top1: float
    """Share of positions with the same likeliest token."""
    decided_differently: int
    """Positions where they choose differently though the fake-quant model's margin is above ``MARGIN``."""
    max_logprob_diff: float
    """Nats, over the tokens that the runtime gave."""
    perplexity: float
    """The runtime's."""
    reference_perplexity: float
    positions: int

    @property
    def perplexity_shift(self) -> float:
        """Relative difference of the perplexities."""
        return abs(self.perplexity / self.reference_perplexity - 1)

    def problem(self) -> str | None:
        """What breaks the rule; None when they agree."""
        if self.decided_differently:
            return f"another token at {self.decided_differently} positions where the model's first choice leads by more than {MARGIN} nat"
        if self.positions < MIN_POSITIONS:
            return None
        if self.top1 < MIN_TOP1:
            return f"the same token at {self.top1:.2%} of {self.positions:,} positions, {MIN_TOP1:.0%} are asked for"
        if not self.perplexity_shift <= MAX_PERPLEXITY_SHIFT:
            return f"perplexity {self.perplexity:.4f} instead of {self.reference_perplexity:.4f}"
        return None


def compare(reference: Tensor, seen: dict[str, NDArray[Any]], tokens: Tensor) -> Agreement:
    """Compare with what ``llama_cpp_check.teacher_forced`` gave.

    Args:
        reference: fp32 logits [B, S, V].
        seen: ids and logprobs [B, S, K], next [B, S - 1].
        tokens: int64 [B, S].
    """
    logprobs = reference.double().log_softmax(-1)
    best = logprobs.topk(2, dim=-1)
    ids = torch.from_numpy(seen["ids"])
    differs = best.indices[..., 0] != ids[..., 0]
    margin = best.values[..., 0] - best.values[..., 1]
    following = logprobs[:, :-1].gather(2, tokens[:, 1:, None])
    return Agreement(
        top1=1 - float(differs.double().mean()),
        decided_differently=int((differs & (margin > MARGIN)).sum()),
        max_logprob_diff=float((logprobs.gather(2, ids) - torch.from_numpy(seen["logprobs"])).abs().max()),
        perplexity=math.exp(-float(seen["next"].astype(np.float64).mean())),
        reference_perplexity=math.exp(-float(following.mean())),
        positions=tokens.numel(),
    )


def check_llama_cpp(path: Path, tokens: Tensor | None) -> dict[str, Any]:
    """Load a GGUF export (a folder with config.json) in llama.cpp, in a fresh process, and compare; see ``check_runtimes``."""
    file = find_gguf(path)
    assert file is not None, path
    if importlib.util.find_spec(PACKAGE) is None:
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
        result, seen = run_llama_cpp(file, chosen, reference.shape[-1], Path(scratch))
    if seen is None:
        return result
    agreement = compare(reference, seen, chosen)
    problem = agreement.problem()
    return outcome(
        "differs" if problem else "agrees",
        top1=agreement.top1,
        max_logprob_diff=agreement.max_logprob_diff,
        perplexity=None if tokens is None else agreement.perplexity,
        positions=agreement.positions,
        reason=problem,
        **result,
    )


def run_llama_cpp(file: Path, tokens: Tensor, vocabulary: int, scratch: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]] | None]:
    """(version, speed and memory; what it predicted), or (an outcome, None) when it did not get that far."""
    places = {"tokens": scratch / "tokens.npy", "seen": scratch / "seen.npz", "result": scratch / "result.json"}
    np.save(places["tokens"], tokens.numpy())
    # -P: no module of the current folder is taken for an installed one
    command = [sys.executable, "-P", "-m", "decoct.qat.llama_cpp_check", str(file.resolve()), "--threads", str(torch.get_num_threads())]
    command += ["--vocabulary", str(vocabulary), *(part for name, place in places.items() for part in (f"--{name}", str(place)))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return outcome("failed", reason=f"no answer within {TIMEOUT_SECONDS} seconds"), None
    if done.returncode != 0 or not places["result"].is_file():
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return outcome("failed", reason=f"exit code {done.returncode}: {said[-1] if said else 'no message'}"), None
    with np.load(places["seen"], allow_pickle=False) as arrays:
        return json.loads(places["result"].read_text(encoding="utf-8")), dict(arrays)
