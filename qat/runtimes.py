"""What installed runtimes make of an export, compared with the model that the independent reader rebuilds.

Each runtime loads the folder in a fresh process, in fp32, on the CPU. There its logits must equal the fake-quant model's to 1e-5 (of
the largest logit, where that is above 1) and predict the same tokens: only the order of additions may differ.
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

import torch
from torch import Tensor

from ..models.errors import UserError
from ..models.host_memory import available_bytes
from .rebuild import load_exported_model
from .structure import model_structure, plain_config

TOLERANCE = 1e-5
"""Largest difference of logits in fp32, relative to the largest logit where that is above 1."""
TIMEOUT_SECONDS = 3600
_SEQUENCES, _POSITIONS = 4, 32


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two sets of logits over the same tokens."""

    top1: float
    """Share of positions where both predict the same token."""
    max_logit_diff: float
    largest_logit: float
    max_logprob_diff: float
    """Largest difference of a log-probability, nats."""
    perplexity: float
    """The second one's, over all positions but the first of each row."""

    @property
    def agrees(self) -> bool:
        """Whether they are equal as far as fp32 goes."""
        return self.top1 == 1.0 and self.max_logit_diff <= TOLERANCE * max(1.0, self.largest_logit)


def compare_logits(reference: Tensor, logits: Tensor, tokens: Tensor) -> Comparison:
    """Compare row by row; a NaN anywhere makes the differences NaN, which never agrees.

    Args:
        reference: fp32 [B, S, V].
        logits: fp32 [B, S, V] of the runtime.
        tokens: int64 [B, S], what both were given.
    """
    logit_diff = torch.zeros(())
    logprob_diff = torch.zeros((), dtype=torch.float64)
    nll, same = 0.0, 0
    for expected, found, row in zip(reference, logits, tokens):
        difference = (expected - found).abs().max()
        logprobs = found.double().log_softmax(-1)
        # torch.maximum passes NaN on, Python's max does not
        logit_diff = torch.maximum(logit_diff, difference)
        logprob_diff = torch.maximum(logprob_diff, (expected.double().log_softmax(-1) - logprobs).abs().max())
        same += int((expected.argmax(-1) == found.argmax(-1)).sum())
        nll -= float(logprobs[:-1].gather(1, row[1:, None]).sum())
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    return Comparison(
        top1=same / tokens.numel(),
        max_logit_diff=float(logit_diff),
        largest_logit=float(reference.abs().max()),
        max_logprob_diff=float(logprob_diff),
        perplexity=math.exp(min(nll / predicted, 700.0)) if predicted else math.nan,
    )


def check_runtimes(folder: Path, *, tokens: Tensor | None = None) -> dict[str, dict[str, Any]]:
    """Load an export in every runtime that can be had here, and compare.

    Args:
        folder: The export.
        tokens: int64 [B, S] of real text, to have perplexities too; None takes 128 pseudo-random tokens.

    Returns:
        By runtime: ``status`` ('agrees', 'differs', 'failed', 'skipped' or 'not installed'), ``top1``, ``max_logprob_diff`` (nats),
        ``perplexity`` (None without ``tokens``), ``version``, ``positions`` and, when it did not agree, ``reason``.

    Raises:
        UserError: the export cannot be rebuilt, or ``tokens`` do not fit its vocabulary.
    """
    return {"transformers": _check_transformers(Path(folder), tokens)}


def _check_transformers(folder: Path, tokens: Tensor | None) -> dict[str, Any]:
    if importlib.util.find_spec("compressed_tensors") is None:
        return _outcome("not installed", reason="pip install compressed-tensors to have the export loaded and compared")
    needed, free = 5 * model_structure(folder).parameters, available_bytes()
    if free is not None and needed > free:
        return _outcome("skipped", reason=f"loading in fp32 needs about {needed:,} bytes of memory, {free:,} are free")
    chosen = _chosen_tokens(folder, tokens)
    with tempfile.TemporaryDirectory(prefix="decoct-verify-") as scratch:
        seen = _run_fresh(folder, chosen, Path(scratch))
        logits = seen.pop("logits", None)
    if logits is None:
        return seen
    if seen["loading"]:
        kind, names = next(iter(seen["loading"].items()))
        return _outcome("failed", version=seen["version"], reason=f"{kind.replace('_', ' ')}: {names[0]} ({len(names)} in all)")
    model = load_exported_model(folder)
    with torch.inference_mode():
        reference = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in chosen])
    seen_values = compare_logits(reference, logits, chosen)
    return _outcome(
        "agrees" if seen_values.agrees else "differs",
        version=seen["version"],
        top1=seen_values.top1,
        max_logprob_diff=seen_values.max_logprob_diff,
        perplexity=None if tokens is None else seen_values.perplexity,
        positions=chosen.numel(),
        reason=None if seen_values.agrees else f"logits differ by {seen_values.max_logit_diff:.3g}, same token at {seen_values.top1:.2%}",
    )


def outcome_text(seen: dict[str, Any]) -> str:
    """What ``check_runtimes`` says of one runtime, for people: 'agrees, top1 1, max_logprob_diff 0, ...'."""
    facts = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in seen.items() if value is not None]
    return ", ".join(fact.removeprefix("status ") for fact in facts)


def _outcome(status: str, **facts: Any) -> dict[str, Any]:
    return {"status": status, **dict.fromkeys(("top1", "max_logprob_diff", "perplexity", "version", "positions", "reason")), **facts}


def _run_fresh(folder: Path, tokens: Tensor, scratch: Path) -> dict[str, Any]:
    """``logits``, ``loading`` and ``version`` from a new process; an outcome without logits when it did not get that far."""
    from safetensors.torch import load_file, save_file

    paths = {name: scratch / f"{name}.{kind}" for name, kind in (("tokens", "safetensors"), ("logits", "safetensors"), ("result", "json"))}
    save_file({"tokens": tokens.contiguous()}, paths["tokens"])
    # -P: no module of the current folder is taken for an installed one
    command = [sys.executable, "-P", "-m", "decoct.qat.runtime_check", str(folder.resolve()), "--threads", str(torch.get_num_threads())]
    command += [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return _outcome("failed", reason=f"no answer within {TIMEOUT_SECONDS} seconds")
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        return _outcome("failed", reason=f"exit code {done.returncode}: {said[-1] if said else 'no message'}")
    result = json.loads(paths["result"].read_text(encoding="utf-8"))
    if "not_installed" in result:
        return _outcome("not installed", reason=result["not_installed"])
    version = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return {"logits": load_file(paths["logits"])["logits"], "loading": result["loading"], "version": version}


def _chosen_tokens(folder: Path, tokens: Tensor | None) -> Tensor:
    config = plain_config(folder).get_text_config()
    vocabulary = int(config.vocab_size)
    if tokens is None:
        length = min(_POSITIONS, int(getattr(config, "max_position_embeddings", None) or _POSITIONS))
        return torch.randint(0, vocabulary, (_SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or not tokens.numel():
        raise UserError(f"tokens must be int64 [B, S], not {tokens.dtype} of shape {tuple(tokens.shape)}")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise UserError(f"tokens span {int(tokens.min())}..{int(tokens.max())}, but {folder} has a vocabulary of {vocabulary}")
    return tokens
