"""What installed runtimes make of an export, compared with the model that the independent reader rebuilds.

Each runtime loads the folder in a fresh process on the CPU. In transformers and fp32 its logits must equal the fake-quant model's to
1e-5 (of the largest logit, where that is above 1) and predict the same tokens: only the order of additions may differ. llama.cpp, which
loads GGUF, rounds activations and has a rule of its own (``llama_cpp_check.py``), and so has vLLM (``vllm_check.py``); some kernels
of GPTQ and AWQ compute in fp16 (``transformers_rules.py``).
"""

import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.common.errors import UserError
from ...models.common.host_memory import available_bytes
from ...models.folder.structure import model_structure, plain_config
from ..readers.gguf_model import find_gguf
from ..rebuild import load_exported_model
from .judge_process import outcome, run_check, unfinished
from .transformers_rules import rule_for

TOLERANCE = 1e-5
"""Largest difference of logits in fp32, relative to the largest logit where that is above 1."""
MARGIN = 0.1
"""Nats between the first and the second choice above which both must choose the same, in whatever arithmetic."""
MIN_TOP1, MAX_PERPLEXITY_SHIFT, MIN_POSITIONS = 0.99, 0.002, 2000
"""In a runtime's own 16-bit arithmetic, over at least so many positions: agreement, and relative difference of the perplexities."""
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
    reference_perplexity: float = math.nan
    """The first one's."""
    decided_differently: int = 0
    """Positions where the second predicts another token though the first one's choice leads by more than 0.1 nat."""
    positions: int = 0

    @property
    def near(self) -> bool:
        """Whether predictions are equal as far as 16-bit arithmetic goes (top-1 and perplexity count from 2,000 positions on)."""
        if self.decided_differently or not math.isfinite(self.max_logit_diff):
            return False
        few = self.positions < MIN_POSITIONS
        return few or (self.top1 >= MIN_TOP1 and abs(self.perplexity / self.reference_perplexity - 1) <= MAX_PERPLEXITY_SHIFT)

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
    nll, same, decided, reference_nll = 0.0, 0, 0, 0.0
    for expected, found, row in zip(reference, logits, tokens):
        difference = (expected - found).abs().max()
        logprobs = found.double().log_softmax(-1)
        # torch.maximum passes NaN on, Python's max does not
        logit_diff = torch.maximum(logit_diff, difference)
        wanted = expected.double().log_softmax(-1)
        logprob_diff = torch.maximum(logprob_diff, (wanted - logprobs).abs().max())
        equal = expected.argmax(-1) == found.argmax(-1)
        best = wanted.topk(2, dim=-1).values
        same += int(equal.sum())
        decided += int((~equal & (best[:, 0] - best[:, 1] > MARGIN)).sum())
        nll -= float(logprobs[:-1].gather(1, row[1:, None]).sum())
        reference_nll -= float(wanted[:-1].gather(1, row[1:, None]).sum())
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    return Comparison(
        top1=same / tokens.numel(),
        max_logit_diff=float(logit_diff),
        largest_logit=float(reference.abs().max()),
        max_logprob_diff=float(logprob_diff),
        perplexity=math.exp(min(nll / predicted, 700.0)) if predicted else math.nan,
        reference_perplexity=math.exp(min(reference_nll / predicted, 700.0)) if predicted else math.nan,
        decided_differently=decided,
        positions=tokens.numel(),
    )


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
        from .llama_cpp_check import check_llama_cpp

        return {"llama.cpp": check_llama_cpp(Path(folder), tokens)}
    from .vllm_check import check_vllm

    return {"transformers": _check_transformers(Path(folder), tokens), "vLLM": check_vllm(Path(folder), tokens)}


def _check_transformers(folder: Path, tokens: Tensor | None) -> dict[str, Any]:
    rule = rule_for(folder)
    if rule.unreadable:
        return outcome("skipped", reason=rule.unreadable)
    if rule.absent:
        wanted = " ".join(rule.absent).replace("_", "-")
        return outcome("not installed", reason=f"pip install {wanted} to have the export loaded and compared")
    needed, free = 5 * model_structure(folder).parameters, available_bytes()
    if free is not None and needed > free:
        return outcome("skipped", reason=f"loading in fp32 needs about {needed:,} bytes of memory, {free:,} are free")
    chosen = chosen_tokens(folder, tokens)
    with tempfile.TemporaryDirectory(prefix="decoct-verify-") as scratch:
        seen = _run_fresh(folder, chosen, Path(scratch))
        logits = seen.pop("logits", None)
    if logits is None:
        return seen
    if seen["loading"]:
        kind, names = next(iter(seen["loading"].items()))
        what = f"it loaded something else than was written; {kind.replace('_', ' ')}: {names[0]} ({len(names)} in all)"
        return outcome("differs", version=seen["version"], reason=what)
    model = load_exported_model(folder, inputs="compressed-tensors")
    with torch.inference_mode():
        reference = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in chosen])
    seen_values = compare_logits(reference, logits, chosen)
    measured = {name: seen[name] for name in ("tokens_per_second", "peak_bytes")}
    agrees = seen_values.agrees if rule.exact else seen_values.near
    return outcome(
        "agrees" if agrees else "differs",
        version=seen["version"],
        top1=seen_values.top1,
        max_logprob_diff=seen_values.max_logprob_diff,
        perplexity=None if tokens is None else seen_values.perplexity,
        positions=chosen.numel(),
        **({} if rule.exact else {"arithmetic": "own"}),
        **measured,
        reason=None if agrees else f"logits differ by {seen_values.max_logit_diff:.3g}, same token at {seen_values.top1:.2%}",
    )


def _run_fresh(folder: Path, tokens: Tensor, scratch: Path) -> dict[str, Any]:
    """``logits``, ``loading``, ``version``, speed and memory from a new process; an outcome when it did not get that far."""
    from safetensors.torch import load_file, save_file

    paths = {name: scratch / f"{name}.{kind}" for name, kind in (("tokens", "safetensors"), ("logits", "safetensors"), ("result", "json"))}
    save_file({"tokens": tokens.contiguous()}, paths["tokens"])
    # -P: no module of the current folder is taken for an installed one
    command = [
        sys.executable,
        "-P",
        "-m",
        "decoct.qat.runtimes.transformers_process",
        str(folder.resolve()),
        "--threads",
        str(torch.get_num_threads()),
    ]
    command += [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    ended = run_check(command, paths["result"], environment)
    result = ended.result
    if "not_installed" in result:
        return outcome("not installed", reason=result["not_installed"])
    if not ended.done:
        return unfinished(ended)
    version = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    measured = {name: result[name] for name in ("loading", "tokens_per_second", "peak_bytes")}
    return {"logits": load_file(paths["logits"])["logits"], "version": version, **measured}


def chosen_tokens(folder: Path, tokens: Tensor | None) -> Tensor:
    """``tokens`` when they fit the model, pseudo-random ones when there are none; UserError when they do not."""
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
