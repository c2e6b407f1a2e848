"""The model card (README.md) of an export: its source, size, figures, loading commands and checks.

It contains no path of the machine that made it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from ..footprint import bits_per_weight
from ..spec import ActivationSpec, QuantSpec
from .format_readers import card_lines

_FLOATS = {
    "fp8_e4m3": ("fp8", "fp8 (e4m3), one bf16 scale per output row (compressed-tensors, float-quantized)"),
    "mxfp4": ("mxfp4", "mxfp4, one power of two per group of 32 inputs ({form})"),
    "nvfp4": ("nvfp4", "nvfp4, one fp8 scale per group of 16 inputs, one fp32 scale per matrix (compressed-tensors, nvfp4-pack-quantized)"),
}
"""Kind of floats -> (the hub's tag, description)."""
_GPUS = {
    "fp8_e4m3": "compute capability 8.9 for rounded inputs, 7.5 without",
    "mxfp4": "compute capability 10.0 for rounded inputs, 7.5 without",
    "nvfp4": "compute capability 10.0 for rounded inputs, 7.5 without",
}
"""Kind of floats -> from which NVIDIA GPUs on vLLM has kernels."""
_ARITHMETIC = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card reports."""

    name: str
    """Title, for example the folder's name."""
    base_model: str | None
    """Hub id or name; only the last part of a local path is shown."""
    model_type: str
    spec: QuantSpec | None
    """None: plain weights."""
    quantized: int
    """Number of quantized linears."""
    unquantized: list[str]
    """Names of linears left in bf16."""
    parameters: int
    weight_bytes: int
    metrics: dict[str, Any] = field(default_factory=dict)
    """``{figure: number}``, or ``{row: {figure: number}}`` for several models or texts."""
    runtimes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Results of ``check_runtimes``; {} if no runtime was checked."""
    scheme: dict[str, int] = field(default_factory=dict)
    """Description of a spec -> number of modules with it; {} if all modules have the same spec."""
    inputs: str = ""
    """How inputs of quantized modules are rounded; '' if they are not."""
    cache: str = ""
    """How keys and values are rounded when they enter the cache; '' if they are not."""
    dequantize: bool = False
    """transformers loads the export only if it dequantizes on loading (``transformers_process.needs_dequantizing``)."""
    format: str = ""
    """Name of the export format; '' if unknown."""
    rounding: str = ""
    """What was rounded to the stored dtype; '' if nothing was."""
    left_out: str = ""
    """Parts of the source that transformers does not load; '' if none."""
    origin: str = ""
    """Where the weights were imported from before they were worked on; '' if they were not."""


def _transformers_and_vllm(facts: CardFacts) -> str:
    bits = facts.spec.bits if facts.spec else 16
    names, option = ("", "")
    if facts.dequantize:
        names, option = ", CompressedTensorsConfig", ", quantization_config=CompressedTensorsConfig(dequantize=True)"
    vllm = "With vLLM" if bits in (4, 8, 16) else f"vLLM reads 4 and 8 bits; whether your version reads {bits} is not known"
    if facts.spec and facts.spec.kind in _GPUS:
        vllm += f", on a GPU ({_GPUS[facts.spec.kind]})"
    return f"""With transformers (`pip install transformers compressed-tensors`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer{names}

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{option})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

{vllm}:

```bash
vllm serve path/to/this/folder{" --kv-cache-dtype fp8" if facts.cache else ""}
```
"""


@dataclass(frozen=True, kw_only=True)
class FormatCard:
    """The parts of a card that depend on the format; the defaults are those of compressed-tensors."""

    tag: str = "compressed-tensors"
    library: str = "transformers"
    """The hub's library_name."""
    scales: str = "bf16 scale per {per} (compressed-tensors, pack-quantized)"
    """How scales are stored; ``{per}`` is replaced by what shares one scale."""
    plain: str = "bf16"
    """Dtype of linears that are not quantized."""
    rest: str = "embeddings, norms and biases are bf16"
    """Dtypes of the other tensors."""
    loading: Callable[[CardFacts], str] = _transformers_and_vllm
    """Returns the commands that load the export."""
    own_arithmetic: tuple[str, ...] = ()
    """Runtimes that do not compute in fp32."""
    unchecked: str = "vLLM"
    """An untested runtime that readers of the card are likely to ask about; '' for none."""


def card_text(facts: CardFacts, form: FormatCard = FormatCard()) -> str:
    """Return the card as Markdown with the hub's YAML header."""
    parts = [
        _header(facts, form),
        f"# {facts.name}\n",
        _made_of(facts, form),
        _evaluation(facts.metrics),
        f"## Loading\n\n{form.loading(facts)}" + "".join(f"\n{line}\n" for line in card_lines(facts.format)),
        _checked(facts, form),
    ]
    return "\n".join(part for part in parts if part)


def shown_name(base_model: str | None) -> str | None:
    """Return a hub id or plain name unchanged, and only the last part of a path."""
    # a relative path such as runs/teacher looks like a hub id: an existing folder is a path
    if base_model is None or (_HUB_ID.fullmatch(base_model) and not Path(base_model).exists()):
        return base_model
    return PurePath(base_model).name or None


def _header(facts: CardFacts, form: FormatCard) -> str:
    shown = shown_name(facts.base_model)
    # the hub resolves base_model to a page, so only a hub id may stand there
    base = [f"base_model: {shown}"] if shown and _HUB_ID.fullmatch(shown) else []
    bits = [f"- {_tag(facts.spec)}"] if facts.spec else []
    tags = ["- decoct", f"- {form.tag}", *bits, f"- {facts.model_type}"]
    return "\n".join(["---", f"library_name: {form.library}", "pipeline_tag: text-generation", *base, "tags:", *tags, "---", ""])


def _tag(spec: QuantSpec) -> str:
    if spec.kind in _FLOATS:
        return _FLOATS[spec.kind][0]
    if spec.kind != "int":
        return spec.kind
    return "ternary" if spec.ternary else f"int{spec.bits}"


def _codes(spec: QuantSpec, form: FormatCard) -> str:
    """Return the codes and scales of one quantization scheme in words."""
    if spec.kind in _FLOATS:
        return _FLOATS[spec.kind][1].format(form=f"{form.tag}, mxfp4-pack-quantized" if form.tag == "compressed-tensors" else form.tag)
    if spec.super_block:
        return f"{spec.kind.upper()}: super-blocks of 256 inputs, with integer scales of their blocks under fp16 numbers ({form.tag})"
    # a scale for the whole matrix is repeated for each row
    per = "output row" if isinstance(spec.group_size, str) else f"group of {spec.group_size} inputs"
    scales = form.scales.format(per=per)
    if spec.kind != "int":
        return f"{spec.kind}, one {scales}"
    if spec.ternary:
        return f"ternary (-1, 0, 1), one fp16 scale per {per} ({form.tag})"
    return f"int{spec.bits}, {'symmetric' if spec.symmetric else 'asymmetric'}, one {scales}"


def _made_of(facts: CardFacts, form: FormatCard) -> str:
    size = f"{facts.weight_bytes:,} bytes, {bits_per_weight(facts.weight_bytes, facts.parameters):.2f} bits per weight"
    rows = [
        ("Base model", shown_name(facts.base_model) or "not recorded"),
        *([("Imported", facts.origin)] if facts.origin else []),
        *(_weight_rows(facts, facts.spec, form) if facts.spec else [("Weights", f"not quantized ({form.tag})")]),
        ("Parameters", f"{facts.parameters:,} (tied tensors once)"),
        *([("Not included", facts.left_out)] if facts.left_out else []),
        ("Weight files", f"{size} (embeddings included); {2 * facts.parameters:,} bytes in bf16"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""])


def _weight_rows(facts: CardFacts, spec: QuantSpec, form: FormatCard) -> list[tuple[str, str]]:
    left = f"; in {form.plain}: {', '.join(facts.unquantized)}" if facts.unquantized else ""
    mixed = "; ".join(f"{count} linears {spec}" for spec, count in facts.scheme.items())
    beside = {"Inputs": facts.inputs, "Keys and values": facts.cache}
    return [
        ("Weights", (mixed and f"{mixed} ({form.tag})") or _codes(spec, form)),
        *((name, text) for name, text in beside.items() if text),
        ("Quantized", f"{facts.quantized} linear layers; {form.rest}{left}"),
    ]


def _evaluation(metrics: dict[str, Any]) -> str:
    if not metrics:
        return ""
    # figures of one model are shown as a table with a single row
    rows = metrics if all(isinstance(value, dict) for value in metrics.values()) else {"this model": metrics}
    figures = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"| | {' | '.join(figures)} |", "|---" * (len(figures) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(_figure(row.get(figure)) for figure in figures)} |" for name, row in rows.items()]
    return "\n".join(["## Evaluation\n", *lines, ""])


def _figure(value: Any) -> str:
    # bool is an int, so it must be handled before numbers
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _speed(seen: dict[str, Any]) -> str:
    if not seen.get("tokens_per_second"):
        return ""
    memory = f", with a peak memory of {seen['peak_bytes'] / 1e6:,.0f} MB" if seen.get("peak_bytes") else ""
    return f" It generated {seen['tokens_per_second']:,.0f} tokens per second on the machine it was checked on{memory}."


def _checked(facts: CardFacts, form: FormatCard) -> str:
    runtimes = facts.runtimes
    lines = [
        "## What was checked\n",
        "- An independent reader rebuilds every weight of the "
        f"{'rounded' if facts.rounding else 'trained'} model from these files, element by element.",
    ]
    if facts.rounding:
        lines.append(f"- {facts.rounding}")
    for name, seen in runtimes.items():
        if seen["status"] == "agrees":
            # a runtime with arithmetic of its own was judged by its predictions, not by its logits
            own = name in form.own_arithmetic or seen.get("arithmetic")
            arithmetic = f"in {_ARITHMETIC.get(str(own), 'its own arithmetic')}" if own else "in fp32 its logits agree"
            lines.append(
                f"- {name} ({seen['version']}) loads them in a fresh process; {arithmetic}: same token at "
                f"{seen['top1']:.2%} of {seen['positions']:,} positions, log-probabilities within {seen['max_logprob_diff']:.1g} nats."
                f"{_speed(seen)}"
            )
        else:
            lines.append(f"- Not checked in {name}: {seen['status']}{'; ' + seen['reason'] if seen['reason'] else ''}.")
    if not runtimes:
        lines.append("- Not loaded in a runtime when it was made: `decoct verify` does that.")
    unchecked = [f"- Not checked in {form.unchecked} here."] if form.unchecked and form.unchecked not in runtimes else []
    return "\n".join([*lines, *unchecked, "- `decoct verify` repeats these checks and compares every file's hash.", ""])


def said_of(spec: ActivationSpec | None, stored: str) -> str:
    """Describe a rounding for the model card; '' for None. ``stored`` names what has its own scale when scales are stored."""
    if spec is None:
        return ""
    scale = "one scale per token, computed at run time" if spec.scaling == "dynamic" else f"one stored scale {stored}"
    kept = "" if spec.outliers is None else f", values of at least {spec.outliers:g} kept in 16 bits"
    return f"{spec.kind}, {'symmetric' if spec.symmetric else 'asymmetric'}, {scale}{kept}"
