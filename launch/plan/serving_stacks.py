"""Judges whether serving stacks load a recipe's exports on their fast path, and names the nearest setting that does.

``qat/export/format_readers.py`` has the formats of each stack, ``qat/export/limits`` the limits of formats, ``stack_rules.py`` the
further requirements of stacks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ...qat.export.format_readers import RUNTIMES, formats_for, reading
from ...qat.export.limits.formats import refusals
from ...qat.export.limits.gguf import GGUF_KINDS
from ...qat.export.limits.plain import FORMATS as PLAIN
from ...qat.export.limits.refusal import OtherFormat
from ...qat.export.limits.stored_model import StoredModel
from ...qat.spec import PACKED_FLOATS, QuantSpec
from .recipe_remedies import RecipeRemedies
from .stack_rules import Outcome, StackFinding, rules
from .stored_shapes import StoredShapes, stored_shapes


@dataclass(frozen=True)
class Verdict:
    """Verdict of one stack on an export."""

    target: str
    outcome: Outcome
    """ok: on its fast path; slower: it loads, with extra work; no: it does not load, or computes another model."""
    reason: str
    fix: str = ""
    """The nearest setting that is ok, as overrides of the recipe; '' if there is nothing to change."""
    format: str = ""
    """The format concerned; '' if the stack reads none of the written formats."""


def verdicts(stored: StoredModel, remedies: RecipeRemedies, *, tensor_parallel: int = 1) -> list[Verdict]:
    """Return for each stack a verdict on each format that it knows, or one naming the formats it reads; the most serious reason first.

    Args:
        stored: The exported model.
        remedies: Phrases remedies; names the model and the formats.
        tensor_parallel: GPUs that serve one copy.
    """
    cases = stored_shapes(remedies, tensor_parallel, stored.activations, stored.kv_cache)
    found: list[Verdict] = []
    for target in RUNTIMES:
        known = [form for form in remedies.formats if reading(form, target)]
        # a stack that reads none of the formats gets a verdict too, or it would be missing without a word
        found += [_of_format(target, form, stored, cases) for form in known] or [_of_none(target, remedies)]
    return found


def _of_none(target: str, remedies: RecipeRemedies) -> Verdict:
    """Return the verdict for a stack that reads none of the written formats."""
    read = formats_for(target)
    return Verdict(target, "no", f"it reads {' or '.join(read)}, which this stage does not write", remedies.other_format(read[0]))


def _of_format(target: str, form: str, stored: StoredModel, cases: Sequence[StoredShapes]) -> Verdict:
    how, remedies = reading(form, target), cases[0].remedies
    assert how is not None
    # worse than a refusal: it would serve another model without a word
    if how.outcome == "misreads":
        # the stack's first format that holds the model; else its first
        other = next((name for name in formats_for(target) if not refusals(name, stored)), formats_for(target)[0])
        return Verdict(target, "no", f"it misreads {form}: {how.how}", remedies.other_format(other, instead_of=form), form)
    if form in PLAIN:
        # plain weights have no codes that a kernel could refuse, and no groups that a cut could break
        served = [replace(case, spec=QuantSpec(group_size="channel")) for case in cases]
    else:
        more = {"compressed-tensors": PACKED_FLOATS, "bitsandbytes": ("nf4",)}.get(form, GGUF_KINDS if form.startswith("gguf") else ())
        held = ("int", *more)
        served = [case for case in cases if case.spec.kind in held]
    # several schemes may give the same finding, which is told once
    reasons = list(dict.fromkeys(finding for case in served for rule in rules(target, form) for finding in rule(case)))
    if all(finding.outcome != "no" for finding in reasons):
        # if the stack itself refuses the scheme, its own reason is more specific than the format's
        reasons += _of_limits(target, form, stored, remedies)
    grave = sorted(reasons, key=lambda finding: ("no", "slower", "ok").index(finding.outcome))
    told = f"; {how.how}" if how.how else ""
    if form == "safetensors" and any(case.spec.kind == "int" and 2 < case.spec.bits <= 4 for case in cases):
        told += "; weights in fp16 and the rest in bf16, which both are exact in float32 (vLLM: --dtype float32)"
    if not grave:
        return Verdict(target, "ok", _fast_path(target, form, served[0]) + told, format=form)
    fix = "; ".join(dict.fromkeys(finding.fix for finding in grave if finding.fix))
    reason = "; ".join(finding.reason for finding in grave)
    return Verdict(target, grave[0].outcome, reason + (told if grave[0].outcome != "no" else ""), fix, form)


def _of_limits(target: str, form: str, stored: StoredModel, remedies: RecipeRemedies) -> Iterable[StackFinding]:
    """Yield what the format cannot hold; another format is a remedy only if the stack reads it."""
    for refusal in refusals(form, stored):
        ways = [way for way in refusal.remedies if not isinstance(way, OtherFormat) or way.name in formats_for(target)]
        phrases = [phrase for way in ways if (phrase := remedies(way, refusal))]
        fix = ", or ".join(what if verb == "use" else f"{verb} {what}" for verb, what in phrases)
        yield StackFinding("no", f"{form} {refusal.reason}", fix)


def _kernels(case: StoredShapes) -> str:
    """Return the server's kernels for a scheme, with the GPUs that have them."""
    spec, kind = case.spec, case.spec.kind
    if case.activations is None:
        return f"Marlin, W{spec.bits}A16" + ("" if kind == "int" else f" in {kind}")
    if kind == "int":
        return "int8 kernels, W8A8"
    return f"{kind} kernels, W{spec.bits}A{spec.bits}, on GPUs from compute capability {'8.9' if kind == 'fp8_e4m3' else '10.0'} on"


def _fast_path(target: str, form: str, case: StoredShapes) -> str:
    if form in PLAIN:
        return "plain weights, as any model's"
    if target in ("vLLM", "SGLang"):
        kernels = _kernels(case)
        cache = ", keys and values in fp8" if case.kv_cache else ""
        return kernels + cache + (f", tensor parallel over {case.ranks}" if case.ranks > 1 else "")
    return {
        "transformers": "weights are unpacked to 16-bit floats when they are loaded",
        "llama.cpp": "its blocks hold groups of this size exactly",
        "ONNX Runtime": "MatMulNBits, the same codes and scales",
        "OpenVINO": "it reads llama.cpp's file",
        "mlx-lm": "it repacks the same codes",
    }[target]
