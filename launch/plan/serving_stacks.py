"""Will a serving stack load what a recipe exports, on its fast path, and if not, what is the nearest setting that does.

``qat/export/format_readers.py`` says which stack knows which format; the rules here are about schemes and widths. They are those of
the stacks' loaders, read in vLLM 0.32 and 0.33, llama.cpp of mid 2026 and ONNX Runtime's contrib operators: kernels for packed weights
want widths of certain multiples, tensor parallelism cuts matrices, fused projections share one scheme.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ...models.common.errors import UserError
from ...qat.export.format_readers import RUNTIMES, formats_for, reading
from .stored_shapes import USUAL_KEYS, Keys, StoredShapes, stored_shapes

if TYPE_CHECKING:
    from ...qat.scheme import QuantScheme
    from ...qat.spec import ActivationSpec
    from .shapes import ModelShape

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` that every target below knows."""
GROUPS = (32, 64, 128)
"""Group sizes of vLLM's Marlin kernels, besides one scale a row."""
_SPLIT_INPUTS = ("o_proj", "down_proj")

Outcome = Literal["ok", "slower", "no"]


@dataclass(frozen=True)
class Verdict:
    """What one stack makes of an export."""

    target: str
    outcome: Outcome
    """ok = on its fast path; slower = it loads and does more than it need; no = it does not load, or computes another model."""
    reason: str
    fix: str = ""
    """The nearest setting that is ok, as overrides of the recipe; '' when nothing is to be done."""
    format: str = ""
    """The format that it is about; '' where the stack reads none of those that are written."""


Rule = Callable[[StoredShapes], Iterable[Verdict]]


def verdicts(
    model: "ModelShape",
    scheme: "QuantScheme | None",
    *,
    tensor_parallel: int = 1,
    formats: Sequence[str] = ("compressed-tensors",),
    activations: "ActivationSpec | None" = None,
    kv_cache: "ActivationSpec | None" = None,
    keys: Keys = USUAL_KEYS,
) -> list[Verdict]:
    """For each target one verdict on each format that it knows, or one that says which it would read; the gravest reason first.

    Args:
        model: The exported model.
        lattices: Of its weights; None = not quantized, which no rule here speaks of.
        tensor_parallel: GPUs that serve one copy.
        formats: Names of the formats that are written.
        activations: How inputs are rounded.
        kv_cache: How keys and values are.
        keys: How keys of remedies begin.
    """
    if scheme is None:
        return []
    asked = stored_shapes(model, scheme, tensor_parallel, formats, activations, kv_cache, keys)
    found: list[Verdict] = []
    for target in RUNTIMES:
        known = [form for form in formats if reading(form, target)]
        found += [_of_format(target, form, asked) for form in known] or [_of_none(target, asked[0])]
    return found


def _of_none(target: str, case: StoredShapes) -> Verdict:
    """Nothing that is written is for this stack."""
    read = formats_for(target)
    return Verdict(target, "no", f"it reads {' or '.join(read)}, which this stage does not write", case.formats_fix(add=read[0]))


def _of_format(target: str, form: str, asked: Sequence[StoredShapes]) -> Verdict:
    how = reading(form, target)
    assert how is not None
    if how.outcome == "misreads":
        # gptq holds symmetric weights alone
        other = next(name for name in formats_for(target) if name != "gptq" or all(case.spec.symmetric for case in asked))
        return Verdict(target, "no", f"it misreads {form}: {how.how}", asked[0].formats_fix(add=other, instead_of=form), form)
    rules = _rules(target, form)
    # plain weights have no groups that a cut could break
    whole = form in PLAIN
    served = [replace(case, spec=replace(case.spec, group_size="channel")) if whole and case.spec.kind == "int" else case for case in asked]
    reasons = list(dict.fromkeys(verdict for case in served for rule in rules for verdict in rule(case)))
    grave = sorted(reasons, key=lambda verdict: ("no", "slower", "ok").index(verdict.outcome))
    told = f"; {how.how}" if how.how else ""
    if form == "safetensors" and any(case.spec.kind == "int" and 2 < case.spec.bits <= 4 for case in asked):
        told += "; weights in fp16 and the rest in bf16, which both are exact in float32 (vLLM: --dtype float32)"
    if not grave:
        return Verdict(target, "ok", _fast_path(target, form, served[0]) + told, format=form)
    fix = "; ".join(dict.fromkeys(verdict.fix for verdict in grave if verdict.fix))
    return Verdict(target, grave[0].outcome, "; ".join(v.reason for v in grave) + (told if grave[0].outcome != "no" else ""), fix, form)


def _fast_path(target: str, form: str, case: StoredShapes) -> str:
    if form in PLAIN:
        return "plain weights, as any model's"
    if target in ("vLLM", "SGLang"):
        kernels = f"Marlin, W{case.spec.bits}A16" if case.activations is None else "int8 kernels, W8A8"
        cache = ", keys and values in fp8" if case.kv_cache else ""
        return kernels + cache + (f", tensor parallel over {case.ranks}" if case.ranks > 1 else "")
    return {
        "transformers": "weights are unpacked to 16-bit floats when they are loaded",
        "llama.cpp": "blocks hold groups of this size exactly",
        "ONNX Runtime": "MatMulNBits, the same codes and scales",
        "OpenVINO": "it reads llama.cpp's file",
        "mlx-lm": "it packs the same codes anew",
    }[target]


PLAIN = ("safetensors", "safetensors-f32")
"""Formats whose weights are not packed."""


def _say(outcome: Outcome, reason: str, fix: str = "") -> Verdict:
    return Verdict("", outcome, reason, fix)


def _family(case: StoredShapes) -> Iterable[Verdict]:
    if case.config.model_type not in FAMILIES:
        yield _say("slower", f"model type {case.config.model_type} is not among those checked ({', '.join(FAMILIES)})")


def _packed_bits(case: StoredShapes) -> Iterable[Verdict]:
    if case.spec.bits not in (4, 8):
        nearest = 4 if case.spec.bits <= 4 else 8
        yield _say("no", f"its kernels for packed weights take 4 and 8 bits, not {case.spec.bits}", case.spec_fix(bits=nearest))


def _marlin_groups(case: StoredShapes) -> Iterable[Verdict]:
    group = case.spec.group_size
    if group != "channel" and group not in GROUPS:
        nearest = min(GROUPS, key=lambda size: (abs(size - int(group)), -size))
        reason = f"Marlin has groups of {', '.join(map(str, GROUPS))} and whole rows, not {group}"
        yield _say("no", reason, case.spec_fix(group_size=nearest))


def _tensor_parallel(case: StoredShapes) -> Iterable[Verdict]:
    """Heads are dealt out whole; row-parallel matrices are cut along their inputs."""
    ranks, sizes = case.ranks, case.model.dimensions
    if ranks == 1:
        return
    heads, keys = sizes.heads, sizes.kv_heads
    if keys and heads % ranks:
        fitting = max(d for d in range(1, ranks + 1) if heads % d == 0)
        yield _say("no", f"{heads} heads cannot be dealt to {ranks} GPUs", f"--tensor-parallel {fitting}")
    if keys and keys % ranks and ranks % keys:
        yield _say("no", f"{keys} key/value heads cannot be dealt to {ranks} GPUs, nor copied evenly", f"--tensor-parallel {keys}")
    if sizes.vocabulary % (64 * ranks):
        yield _say("ok", f"the vocabulary of {sizes.vocabulary:,} is padded to a multiple of {64 * ranks}")
    group = case.spec.group_size
    for name in _SPLIT_INPUTS:
        size = next((s for n, s in case.linears.items() if n.endswith(name)), None)
        if size is None:
            continue
        if size[1] % ranks or (group != "channel" and (size[1] // ranks) % int(group)):
            unit = ranks * (128 if group == "channel" else int(group))
            reason = f"{name} takes {size[1]:,} inputs, and a GPU's share of them is no multiple of the group size {group}"
            fewer = f"--tensor-parallel {_largest_ranks(case, size[1])}"
            yield _say("no", reason, (case.ffn_fix(unit) if name == "down_proj" else "") or fewer)


def _largest_ranks(case: StoredShapes, width: int) -> int:
    unit = 1 if case.spec.group_size == "channel" else int(case.spec.group_size)
    return max((r for r in range(1, case.ranks) if width % (r * unit) == 0), default=1)


def _marlin_widths(case: StoredShapes) -> Iterable[Verdict]:
    """Marlin tiles: (outputs, inputs) multiples of (64, 128) or (128, 64) on each GPU; others are padded with zeros."""
    if case.activations is not None:
        return  # kernels for int8 inputs are others; what they need, the format asks for
    for name, (rows, columns) in case.linears.items():
        row_parallel = name.endswith(_SPLIT_INPUTS)
        out = rows if row_parallel else rows // case.ranks
        if name.endswith(("k_proj", "v_proj")):
            # fewer heads than GPUs: each head is copied
            out = max(rows // case.ranks, case.model.dimensions.head_dim)
        inner = columns // case.ranks if row_parallel else columns
        if (out % 64 == 0 and inner % 128 == 0) or (out % 128 == 0 and inner % 64 == 0):
            continue
        fix = case.ffn_fix(128 * case.ranks) if name.startswith("mlp.") and case.model.dimensions.ffn % (128 * case.ranks) else ""
        yield _say("slower", f"{name} is {out:,} x {inner:,} on a GPU; Marlin pads what is no multiple of 64 x 128", fix)
        return


def _fused(case: StoredShapes) -> Iterable[Verdict]:
    """q, k, v and gate, up are one matrix in the server: one scheme for all of them."""
    if case.apart is None:
        return
    names, left = case.apart.names, case.apart.left
    parts = f"{', '.join(names)} are one matrix there and need one scheme, but"
    if left:
        others = [f"*.{name}" for name in names if name not in left]
        yield _say("no", f"{parts} skip leaves out {', '.join(left)} alone", case.skip_fix(*others))
    else:
        fix = f"{case.keys.quantizer}overrides: name all of {', '.join(names)} alike, or none"
        yield _say("no", f"{parts} overrides give them different ones", fix)


def _integers(case: StoredShapes) -> Iterable[Verdict]:
    if case.spec.kind != "int":
        yield _say("no", f"no format that decoct writes holds kind={case.spec.kind} yet", case.spec_fix(kind="int"))


def _plain_embedding(case: StoredShapes) -> Iterable[Verdict]:
    if "embedding" in case.ends:
        fix = f"leave {case.keys.quantizer}embedding out"
        yield _say("no", "the formats that it reads leave the embedding alone", fix)


def _fixed_head_dim(case: StoredShapes) -> Iterable[Verdict]:
    config = case.config
    head_dim = case.model.dimensions.head_dim
    if config.model_type == "qwen2" and head_dim * config.num_attention_heads != config.hidden_size:
        reason = f"its Qwen2 takes head_dim = hidden / heads, not {head_dim}"
        yield _say("no", reason, "keep hidden / heads, or serve with --model-impl transformers")


def _llama_hidden(case: StoredShapes) -> Iterable[Verdict]:
    config = case.config
    if config.model_type == "llama" and config.hidden_size % config.num_attention_heads:
        yield _say("no", f"hidden size {config.hidden_size} is no multiple of {config.num_attention_heads} heads, which its Llama refuses")


def _gguf_blocks(case: StoredShapes) -> Iterable[Verdict]:
    """Blocks of 32 with one fp16 scale. They hold narrower codes exactly, in as many bytes."""
    spec = case.spec
    held = 4 if spec.bits <= 4 else 5 if spec.bits == 5 else 8
    narrow = spec.bits == 2 and any(form == "gguf-q2_0" for form in case.formats)
    if spec.bits != held and spec.symmetric and not narrow:
        fix = case.spec_fix(bits=held)
        if spec.bits == 2 and spec.group_size in ("channel", 64, 128):
            fix += f", or {case.formats_fix(add='gguf-q2_0', instead_of='gguf')} for a llama.cpp from July 2026 on"
        yield _say("slower", f"its blocks have 4, 5 and 8 bits, not {spec.bits}: each code takes {held}", fix)
    if not spec.symmetric and spec.bits > 5:
        fix = f"{case.spec_fix(symmetric='true')}, or {case.spec_fix(bits=4)}"
        yield _say("no", f"its blocks hold asymmetric codes of 5 bits at most, not {spec.bits}", fix)
    if not spec.symmetric and spec.bits == 5:
        fix = f"{case.spec_fix(symmetric='true')}, or {case.spec_fix(bits=4)}"
        yield _say("no", "Q5_1 stores zero point times scale in fp16, which hardly ever holds it at 5 bits", fix)
    if spec.group_size != "channel" and int(spec.group_size) % 32:
        fix = case.spec_fix(group_size=32)
        yield _say("no", f"a block of 32 weights has one scale, and groups of {spec.group_size} are no multiple", fix)
    for name, (_, columns) in case.linears.items():
        if columns % 32:
            yield _say("no", f"{name} has {columns:,} inputs, no multiple of a block of 32", case.ffn_fix(32))
            return


def _gguf_model(case: StoredShapes) -> Iterable[Verdict]:
    """What the exporter would refuse of the config, before anything is trained."""
    from ...qat.export.gguf.metadata import model_metadata
    from ...qat.export.gguf.names import architecture_of

    try:
        model_metadata(case.config, architecture_of(case.config.model_type))
    except UserError as error:
        yield _say("no", str(error))


def _asymmetric_gptq(case: StoredShapes) -> Iterable[Verdict]:
    """vLLM's fast GPTQ kernels take symmetric weights; what others make of version 2 differs between its releases."""
    fix = case.formats_fix(add="compressed-tensors", instead_of="gptq_v2")
    yield _say("slower", "not every kernel of every release reads gptq_v2, and none of the fast ones", fix)


def _onnx(case: StoredShapes) -> Iterable[Verdict]:
    spec = case.spec
    if spec.bits not in (2, 4, 8):
        yield _say("no", f"MatMulNBits takes 2, 4 and 8 bits, not {spec.bits}", case.spec_fix(bits=4 if spec.bits < 6 else 8))
    elif spec.bits != 4:
        yield _say("slower", f"its builder was tried with 4 bits alone, not with {spec.bits}", case.spec_fix(bits=4))
    group = spec.group_size
    if group == "channel" or int(group) < 16 or int(group) & (int(group) - 1):
        yield _say("no", f"its block sizes are powers of two from 16 on, not {group}", case.spec_fix(group_size=32))


def _openvino(case: StoredShapes) -> Iterable[Verdict]:
    if case.spec.bits > 4 or not case.spec.symmetric or case.config.model_type not in ("llama", "qwen2", "qwen3"):
        yield _say("slower", "its reader was tried with Q4_0 of Llama, Qwen2 and Qwen3 alone")


def _mlx(case: StoredShapes) -> Iterable[Verdict]:
    if case.spec.group_size not in GROUPS:
        groups = ", ".join(map(str, GROUPS))
        yield _say("no", f"it has groups of {groups}, not {case.spec.group_size}", case.spec_fix(group_size=64))


def _transformers_reader(case: StoredShapes) -> Iterable[Verdict]:
    if case.spec.bits not in (2, 4, 8):
        fix = case.spec_fix(bits=4 if case.spec.bits < 6 else 8)
        yield _say("no", f"versions of the format pack {case.spec.bits} bits differently", fix)


_PACKED: tuple[Rule, ...] = (_integers, _plain_embedding)
_SERVER: tuple[Rule, ...] = (*_PACKED, _family, _packed_bits, _marlin_groups, _tensor_parallel, _marlin_widths, _fused, _fixed_head_dim)
_PLAIN_SERVER: tuple[Rule, ...] = (_family, _tensor_parallel, _fixed_head_dim)
_RULES: dict[str, tuple[Rule, ...]] = {
    "vLLM": _SERVER,
    "SGLang": _SERVER,
    "transformers": (*_PACKED, _transformers_reader, _llama_hidden),
    "llama.cpp": (_integers, _gguf_model, _gguf_blocks),
    "ONNX Runtime": (*_PACKED, _onnx),
    "OpenVINO": (_integers, _gguf_model, _gguf_blocks, _openvino),
    "mlx-lm": (*_PACKED, _mlx),
}
"""Target -> its rules for packed weights."""


def _rules(target: str, form: str) -> tuple[Rule, ...]:
    if form in PLAIN:
        return _PLAIN_SERVER if target in ("vLLM", "SGLang") else (_llama_hidden,)
    own = (_asymmetric_gptq,) if form == "gptq_v2" and target in ("vLLM", "SGLang") else ()
    return (*_RULES[target], *own)
