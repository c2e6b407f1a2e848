"""Will a serving stack load what a recipe exports, on its fast path, and if not, what is the nearest setting that does.

The rules are those of the stacks' loaders (read in vLLM 0.32/0.33, llama.cpp of mid 2026 and ONNX Runtime's contrib operators): kernels for
packed weights want widths of certain multiples, tensor parallelism cuts matrices, fused projections share one scheme.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...models.errors import UserError
from .cases import Case, cases

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ...qat.lattices import Lattices
    from ...qat.spec import ActivationSpec

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
    """ok = on its fast path; slower = it loads and does more than it need; no = it does not load."""
    reason: str
    fix: str = ""
    """The nearest setting that is ok, as a recipe key; '' when nothing is to be done."""


Rule = Callable[[Case], Iterable[Verdict]]


def verdicts(
    config: "PreTrainedConfig",
    lattices: "Lattices | None",
    *,
    tensor_parallel: int = 1,
    formats: Sequence[str] = ("compressed-tensors",),
    activations: "ActivationSpec | None" = None,
    kv_cache: "ActivationSpec | None" = None,
) -> list[Verdict]:
    """One verdict for each target, the gravest reason first.

    Args:
        config: Of the exported model.
        lattices: Of its weights; None = not quantized, which no rule here speaks of.
        tensor_parallel: GPUs that serve one copy.
        formats: Names of the formats that are written.
        activations: How inputs are rounded.
        kv_cache: How keys and values are.
    """
    if lattices is None:
        return []
    asked = cases(config, lattices, tensor_parallel, formats, activations, kv_cache)
    found = []
    for target, rules in TARGETS.items():
        reasons = list(dict.fromkeys(verdict for case in asked for rule in rules for verdict in rule(case)))
        grave = sorted(reasons, key=lambda verdict: ("no", "slower", "ok").index(verdict.outcome))
        found.append(
            Verdict(target, grave[0].outcome, "; ".join(v.reason for v in grave), "; ".join(dict.fromkeys(v.fix for v in grave if v.fix)))
            if grave
            else Verdict(target, "ok", _fast_path(target, asked[0]))
        )
    return found


def _fast_path(target: str, case: Case) -> str:
    if target in ("vLLM", "SGLang"):
        kernels = f"Marlin, W{case.spec.bits}A16" if case.activations is None else "int8 kernels, W8A8"
        cache = ", keys and values in fp8" if case.kv_cache else ""
        return kernels + cache + (f", tensor parallel over {case.ranks}" if case.ranks > 1 else "")
    return {
        "transformers": f"{_read_by_transformers(case)}; weights are unpacked to 16-bit floats when they are loaded",
        "llama.cpp": "blocks of 32 hold groups of this size exactly",
        "ONNX Runtime": "MatMulNBits",
    }[target]


def _read_by_transformers(case: Case) -> str:
    return ", ".join(form for form in case.formats if form in SAFETENSORS_FORMATS)


def _say(outcome: Outcome, reason: str, fix: str = "") -> Verdict:
    return Verdict("", outcome, reason, fix)


def _family(case: Case) -> Iterable[Verdict]:
    if case.config.model_type not in FAMILIES:
        yield _say("slower", f"model type {case.config.model_type} is not among those checked ({', '.join(FAMILIES)})")


def _packed_bits(case: Case) -> Iterable[Verdict]:
    if case.spec.bits not in (4, 8):
        nearest = 4 if case.spec.bits <= 4 else 8
        yield _say("no", f"its kernels for packed weights take 4 and 8 bits, not {case.spec.bits}", f"weights.bits={nearest}")


def _marlin_groups(case: Case) -> Iterable[Verdict]:
    group = case.spec.group_size
    if group != "channel" and group not in GROUPS:
        nearest = min(GROUPS, key=lambda size: (abs(size - int(group)), -size))
        yield _say("no", f"Marlin has groups of {', '.join(map(str, GROUPS))} and whole rows, not {group}", f"weights.group_size={nearest}")


def _tensor_parallel(case: Case) -> Iterable[Verdict]:
    """Heads are dealt out whole; row-parallel matrices are cut along their inputs."""
    ranks, config = case.ranks, case.config
    if ranks == 1:
        return
    heads, keys = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % ranks:
        fitting = max(d for d in range(1, ranks + 1) if heads % d == 0)
        yield _say("no", f"{heads} heads cannot be dealt to {ranks} GPUs", f"--tensor-parallel {fitting}")
    if keys % ranks and ranks % keys:
        yield _say("no", f"{keys} key/value heads cannot be dealt to {ranks} GPUs, nor copied evenly", f"--tensor-parallel {keys}")
    if config.vocab_size % (64 * ranks):
        yield _say("ok", f"the vocabulary of {config.vocab_size:,} is padded to a multiple of {64 * ranks}")
    group = case.spec.group_size
    for name in _SPLIT_INPUTS:
        size = next((s for n, s in case.linears.items() if n.endswith(name)), None)
        if size is None:
            continue
        if size[1] % ranks or (group != "channel" and (size[1] // ranks) % int(group)):
            unit = ranks * (128 if group == "channel" else int(group))
            reason = f"{name} takes {size[1]:,} inputs, and a GPU's share of them is no multiple of the group size {group}"
            yield _say("no", reason, _ffn_fix(case, unit) if name == "down_proj" else f"--tensor-parallel {_largest_ranks(case, size[1])}")


def _largest_ranks(case: Case, width: int) -> int:
    unit = 1 if case.spec.group_size == "channel" else int(case.spec.group_size)
    return max((r for r in range(1, case.ranks) if width % (r * unit) == 0), default=1)


def _ffn_fix(case: Case, unit: int) -> str:
    """FFN channels that fit: the next multiple below, or above where there is none."""
    return f"prune.structured.ffn={max(unit, case.ffn // unit * unit)}"


def _marlin_widths(case: Case) -> Iterable[Verdict]:
    """Marlin tiles: (outputs, inputs) multiples of (64, 128) or (128, 64) on each GPU; others are padded with zeros."""
    if case.activations is not None:
        return  # kernels for int8 inputs are others; what they need, the format asks for
    for name, (rows, columns) in case.linears.items():
        row_parallel = name.endswith(_SPLIT_INPUTS)
        out = rows if row_parallel else rows // case.ranks
        if name.endswith(("k_proj", "v_proj")):
            # fewer heads than GPUs: each head is copied
            out = max(rows // case.ranks, case.head_dim)
        inner = columns // case.ranks if row_parallel else columns
        if (out % 64 == 0 and inner % 128 == 0) or (out % 128 == 0 and inner % 64 == 0):
            continue
        fix = _ffn_fix(case, 128 * case.ranks) if name.startswith("mlp.") and case.ffn % (128 * case.ranks) else ""
        yield _say("slower", f"{name} is {out:,} x {inner:,} on a GPU; Marlin pads what is no multiple of 64 x 128", fix)
        return


def _fused(case: Case) -> Iterable[Verdict]:
    """q, k, v and gate, up are one matrix in the server: one scheme for all of them."""
    if case.apart is None:
        return
    names, left = case.apart.names, case.apart.left
    parts = f"{', '.join(names)} are one matrix there and need one scheme, but"
    if left:
        others = [f"'*.{name}'" for name in names if name not in left]
        yield _say("no", f"{parts} skip leaves out {', '.join(left)} alone", f"skip: add {', '.join(others)}, or drop the pattern")
    else:
        yield _say("no", f"{parts} overrides give them different ones", f"overrides: name all of {', '.join(names)} alike, or none")


def _integers(case: Case) -> Iterable[Verdict]:
    if case.spec.kind != "int":
        yield _say("no", f"no format that decoct writes holds kind={case.spec.kind} yet", "weights.kind=int")


def _plain_embedding(case: Case) -> Iterable[Verdict]:
    if "embedding" in case.ends:
        yield _say("no", "the formats that it reads leave the embedding alone", "leave embedding out, or export to gguf")


def _fixed_head_dim(case: Case) -> Iterable[Verdict]:
    config = case.config
    if config.model_type == "qwen2" and case.head_dim * config.num_attention_heads != config.hidden_size:
        reason = f"its Qwen2 takes head_dim = hidden / heads, not {case.head_dim}"
        yield _say("no", reason, "keep hidden / heads, or serve with --model-impl transformers")


def _llama_hidden(case: Case) -> Iterable[Verdict]:
    config = case.config
    if config.model_type == "llama" and config.hidden_size % config.num_attention_heads:
        yield _say("no", f"hidden size {config.hidden_size} is no multiple of {config.num_attention_heads} heads, which its Llama refuses")


def _gguf_blocks(case: Case) -> Iterable[Verdict]:
    """Q4_0 and Q8_0: blocks of 32 with one fp16 scale. They hold narrower codes exactly, in as many bytes."""
    spec = case.spec
    if spec.bits not in (4, 8):
        held = 4 if spec.bits < 4 else 8
        yield _say("slower", f"Q4_0 and Q8_0 have 4 and 8 bits, not {spec.bits}: each code takes {held}", f"weights.bits={held}")
    if spec.group_size != "channel" and int(spec.group_size) % 32:
        yield _say("no", f"a block of 32 weights has one scale, and groups of {spec.group_size} are no multiple", "weights.group_size=32")
    for name, (_, columns) in case.linears.items():
        if columns % 32:
            yield _say("no", f"{name} has {columns:,} inputs, no multiple of a block of 32", _ffn_fix(case, 32))
            return


def _gguf_model(case: Case) -> Iterable[Verdict]:
    """What the exporter would refuse of the config, before anything is trained."""
    from ...qat.export.gguf_metadata import model_metadata
    from ...qat.export.gguf_names import architecture_of

    try:
        model_metadata(case.config, architecture_of(case.config.model_type))
    except UserError as error:
        yield _say("no", str(error))


def _gguf_format(case: Case) -> Iterable[Verdict]:
    if not any(form.startswith("gguf") for form in case.formats):
        yield _say("no", "it reads GGUF, which this stage does not write (its own converter would round anew)", "export.formats: add gguf")


SAFETENSORS_FORMATS = ("compressed-tensors", "gptq", "gptq_v2", "awq", "safetensors")
"""Formats that vLLM, SGLang and transformers read."""


def _packed_format(case: Case) -> Iterable[Verdict]:
    if not any(form in SAFETENSORS_FORMATS for form in case.formats):
        yield _say("no", "it reads compressed-tensors, which this stage does not write", "export.formats: add compressed-tensors")


def _gptq_kernels(case: Case) -> Iterable[Verdict]:
    """vLLM's fast GPTQ kernels take symmetric weights; what others make of version 2 differs between its releases."""
    if "gptq_v2" in case.formats and "compressed-tensors" not in case.formats:
        yield _say(
            "slower", "not every kernel of every release reads gptq_v2, and none of the fast ones", "export.formats: add compressed-tensors"
        )


def _onnx(case: Case) -> Iterable[Verdict]:
    spec = case.spec
    if spec.bits not in (2, 4, 8):
        yield _say("no", f"MatMulNBits takes 2, 4 and 8 bits, not {spec.bits}", f"weights.bits={4 if spec.bits < 6 else 8}")
    group = spec.group_size
    if group == "channel" or int(group) < 16 or int(group) & (int(group) - 1):
        yield _say("no", f"its block sizes are powers of two from 16 on, not {group}", "weights.group_size=32")
    yield _say("no", "it reads ONNX, which decoct does not write yet")


def _transformers_reader(case: Case) -> Iterable[Verdict]:
    if case.spec.bits not in (2, 4, 8):
        yield _say("no", f"versions of the format pack {case.spec.bits} bits differently", f"weights.bits={4 if case.spec.bits < 6 else 8}")


_SERVER: tuple[Rule, ...] = (
    _integers,
    _plain_embedding,
    _packed_format,
    _gptq_kernels,
    _family,
    _packed_bits,
    _marlin_groups,
    _tensor_parallel,
    _marlin_widths,
    _fused,
    _fixed_head_dim,
)
TARGETS: dict[str, tuple[Rule, ...]] = {
    "vLLM": _SERVER,
    "SGLang": _SERVER,
    "transformers": (_integers, _plain_embedding, _packed_format, _transformers_reader, _llama_hidden),
    "llama.cpp": (_integers, _gguf_format, _gguf_model, _gguf_blocks),
    "ONNX Runtime": (_onnx,),
}
"""Target -> its rules."""
