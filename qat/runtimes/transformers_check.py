"""Loads an export in plain transformers and compares it with the model that the independent reader rebuilds.

The export is loaded in fp32 on the CPU. ``transformers_rules.py`` selects the rule of ``agreement.py`` for a format.
"""

import sys
from typing import Any

import torch

from .agreement import MAX_PERPLEXITY_SHIFT, compare_logits
from .judge_process import run_judge
from .outcome import outcome, verdict
from .reference import Reference
from .transformers_rules import rule_for

_SCRIPT = ("-m", "decoct.qat.runtimes.transformers_process")
_ENVIRONMENT = {"TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}


def check_transformers(reference: Reference) -> dict[str, Any]:
    """Load an export folder and compare; see ``check_runtimes``."""
    rule = rule_for(reference.folder)
    if rule.unreadable:
        return outcome("skipped", reason=rule.unreadable)
    if rule.absent:
        wanted = " ".join(rule.absent).replace("_", "-")
        return outcome("not installed", reason=f"pip install {wanted} to have the export loaded and compared")
    if skipped := reference.too_large():
        return skipped
    facts, seen = run_judge(sys.executable, _SCRIPT, reference.folder, reference.tokens, _ENVIRONMENT)
    if seen is None:
        return facts
    loading = facts.pop("loading")
    # before logits: missing or unexpected weights explain any difference better than numbers
    if loading:
        kind, names = next(iter(loading.items()))
        what = f"it did not load what was written; {kind.replace('_', ' ')}: {names[0]} ({len(names)} in all)"
        return outcome("differs", version=facts["version"], reason=what)
    # each package rounds inputs in a way of its own
    agreement = compare_logits(reference.logits("package"), torch.from_numpy(seen["logits"]), reference.tokens)
    problem = agreement.problem(None if rule.exact else MAX_PERPLEXITY_SHIFT["transformers"])
    arithmetic = {} if rule.exact else {"arithmetic": "own"}
    return verdict(agreement, problem, real_text=reference.real_text, **arithmetic, **facts)
