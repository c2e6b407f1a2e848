"""What serving stacks require of an export in addition to its format: widths and groups of their kernels, and tensor parallelism.

The rules come from the stacks' loaders: vLLM 0.32 and 0.33, llama.cpp of mid 2026 and ONNX Runtime's contrib operators. Kernels for packed
weights need widths that are multiples of their tiles, tensor parallelism cuts matrices, and fused projections share one scheme.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from ...models.family_map import FAMILIES as MAPS
from ...qat.export.gguf.blocks import is_q2_0, is_ternary, symmetric_bits
from ...qat.export.limits.plain import FORMATS as PLAIN
from ...qat.export.limits.shared import nearest_bits
from .stored_shapes import StoredShapes

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` that were checked with vLLM and SGLang."""
GROUPS = (32, 64, 128)
"""Group sizes of vLLM's Marlin kernels, which also accept one scale per row; mlx-lm has the same."""
_SPLIT_INPUTS = ("o_proj", "down_proj")

Outcome = Literal["ok", "slower", "no"]


class StackFinding(NamedTuple):
    """One finding of a stack's rules on an export."""

    outcome: Outcome
    """ok: on its fast path; slower: it loads, with extra work; no: it does not load, or computes another model."""
    reason: str
    fix: str = ""
    """The nearest setting that is ok, as overrides of the recipe; '' if there is nothing to change."""


Rule = Callable[[StoredShapes], Iterable[StackFinding]]


def rules(target: str, form: str) -> tuple[Rule, ...]:
    """Return the rules of a stack for a format that it reads."""
    # plain weights have no codes: only rules about the model's shape hold
    if form in PLAIN:
        return _PLAIN_SERVER if target in ("vLLM", "SGLang") else (_llama_hidden,)
    own = (_asymmetric_gptq,) if form == "gptq_v2" and target in ("vLLM", "SGLang") else ()
    return (*_RULES[target], *own)


def _family(case: StoredShapes) -> Iterable[StackFinding]:
    if case.config.model_type not in FAMILIES:
        # slower and not no: other families may work, but were not checked
        yield StackFinding("slower", f"model type {case.config.model_type} is not among those checked ({', '.join(FAMILIES)})")


def _kernel_bits(case: StoredShapes) -> Iterable[StackFinding]:
    bits = case.spec.bits
    if case.spec.kind == "int" and bits not in (4, 8):
        # the next width that holds every code
        yield StackFinding("no", f"its kernels for packed weights take 4 and 8 bits, not {bits}", case.spec_fix(bits=4 if bits <= 4 else 8))


def _marlin_groups(case: StoredShapes) -> Iterable[StackFinding]:
    group = case.spec.group_size
    # floats in blocks have kernels for their one group size
    if case.spec.kind == "int" and group != "channel" and group not in GROUPS:
        # of two equally near sizes the larger, which costs fewer scales
        nearest = min(GROUPS, key=lambda size: (abs(size - int(group)), -size))
        reason = f"Marlin takes groups of {', '.join(map(str, GROUPS))} or whole rows, not {group}"
        yield StackFinding("no", reason, case.spec_fix(group_size=nearest))


def _tensor_parallel(case: StoredShapes) -> Iterable[StackFinding]:
    """Tensor parallelism distributes whole heads and cuts row-parallel matrices along their inputs."""
    ranks, sizes = case.ranks, case.model.dimensions
    if ranks == 1:
        return
    heads, keys = sizes.heads, sizes.kv_heads
    # models without attention (state space) have no heads to deal out
    if keys and heads % ranks:
        fitting = max(d for d in range(1, ranks + 1) if heads % d == 0)
        yield StackFinding("no", f"{heads} heads cannot be distributed over {ranks} GPUs", f"--tensor-parallel {fitting}")
    # fewer key/value heads than GPUs are copied, which needs a whole number of copies
    if keys and keys % ranks and ranks % keys:
        reason = f"{keys} key/value heads can neither be distributed over {ranks} GPUs nor copied evenly"
        yield StackFinding("no", reason, f"--tensor-parallel {keys}")
    # servers pad the vocabulary to a multiple of 64 on each GPU; said, because the memory is not in the export
    if sizes.vocabulary % (64 * ranks):
        yield StackFinding("ok", f"the vocabulary of {sizes.vocabulary:,} is padded to a multiple of {64 * ranks}")
    group = case.spec.group_size
    for name in _SPLIT_INPUTS:
        # layers are alike in shape, so one linear of this name stands for all
        size = next((s for n, s in case.linears.items() if n.endswith(name)), None)
        if size is None:
            continue
        if size[1] % ranks or (group != "channel" and (size[1] // ranks) % int(group)):
            # whole groups on each GPU, or whole tiles of the kernel where there are no groups
            unit = ranks * (128 if group == "channel" else int(group))
            wrong = f"they cannot be cut evenly over {ranks} GPUs"
            if group != "channel":
                wrong = f"a GPU's share of them is not a multiple of the group size {group}"
            reason = f"{name} has {size[1]:,} inputs, and {wrong}"
            fewer = f"--tensor-parallel {_largest_ranks(case, size[1])}"
            yield StackFinding("no", reason, (case.ffn_fix(unit) if name == "down_proj" else "") or fewer)


def _largest_ranks(case: StoredShapes, width: int) -> int:
    # one scale per row: there are no groups to cut
    unit = 1 if case.spec.group_size == "channel" else int(case.spec.group_size)
    return max((r for r in range(1, case.ranks) if width % (r * unit) == 0), default=1)


def _marlin_widths(case: StoredShapes) -> Iterable[StackFinding]:
    """Marlin tiles: (outputs, inputs) multiples of (64, 128) or (128, 64) on each GPU; others are padded with zeros."""
    if case.activations is not None:
        return  # rounded inputs use other kernels; the limits of the format cover what those need
    for name, (rows, columns) in case.linears.items():
        row_parallel = name.endswith(_SPLIT_INPUTS)
        out = rows if row_parallel else rows // case.ranks
        if name.endswith(("k_proj", "v_proj")):
            # fewer heads than GPUs: heads are replicated
            out = max(rows // case.ranks, case.model.dimensions.head_dim)
        inner = columns // case.ranks if row_parallel else columns
        if (out % 64 == 0 and inner % 128 == 0) or (out % 128 == 0 and inner % 64 == 0):
            continue
        # only the FFN has a width that a recipe can change
        fix = case.ffn_fix(128 * case.ranks) if name.startswith("mlp.") and case.model.dimensions.ffn % (128 * case.ranks) else ""
        yield StackFinding("slower", f"{name} is {out:,} x {inner:,} on a GPU; Marlin pads sizes that are not multiples of 64 x 128", fix)
        return


def _fused(case: StoredShapes) -> Iterable[StackFinding]:
    """Servers fuse q, k and v, and gate and up, into one matrix that is quantized as a whole or not at all."""
    if case.partly is not None:
        names, left = case.partly.names, case.partly.left
        reason = f"it fuses {', '.join(names)} into one matrix with one scheme, but skip leaves out only {', '.join(left)}"
        yield StackFinding("no", reason, case.remedies.skip(*(f"*.{name}" for name in names if name not in left)))


def _fixed_head_dim(case: StoredShapes) -> Iterable[StackFinding]:
    family, sizes = MAPS.get(case.config.model_type), case.model.dimensions
    if family and not family.vllm_head_dim and sizes.head_dim * sizes.heads != sizes.hidden:
        reason = f"its {family.name} requires head_dim = hidden / heads, not {sizes.head_dim}"
        yield StackFinding("no", reason, "keep hidden / heads, or serve with --model-impl transformers")


def _llama_hidden(case: StoredShapes) -> Iterable[StackFinding]:
    family, sizes = MAPS.get(case.config.model_type), case.model.dimensions
    if family and family.whole_heads and sizes.hidden % sizes.heads:
        reason = f"its {family.name} requires a hidden size that is a multiple of the {sizes.heads} heads, not {sizes.hidden}"
        yield StackFinding("no", reason)


def _narrow_codes(case: StoredShapes) -> Iterable[StackFinding]:
    """Blocks hold narrower codes exactly, but save no bytes with them."""
    spec = case.spec
    if spec.kind != "int" or not spec.symmetric or (held := symmetric_bits(spec.bits)) == spec.bits:
        return
    # blocks of their own hold ternary codes
    if all(is_ternary(spec, columns) for _, columns in case.linears.values()):
        return
    narrow = any(is_q2_0(spec, columns) for _, columns in case.linears.values())
    # the recipe also writes the format that has blocks of two bits
    if narrow and "gguf-q2_0" in case.remedies.formats:
        return
    fix = case.spec_fix(bits=held)
    if narrow:
        fix += f", or {case.remedies.other_format('gguf-q2_0', instead_of='gguf')} for a llama.cpp from July 2026 on"
    yield StackFinding("slower", f"its blocks have 4, 5 and 8 bits, not {spec.bits}: each code takes {held}", fix)


def _asymmetric_gptq(case: StoredShapes) -> Iterable[StackFinding]:
    """vLLM's fast GPTQ kernels take symmetric weights only; whether other kernels read version 2 differs between its releases."""
    fix = case.remedies.other_format("compressed-tensors", instead_of="gptq_v2")
    yield StackFinding("slower", "none of the fast kernels reads gptq_v2, and not every other kernel does in every release", fix)


def _onnx(case: StoredShapes) -> Iterable[StackFinding]:
    spec = case.spec
    if spec.bits not in (2, 4, 8):
        yield StackFinding("no", f"MatMulNBits takes 2, 4 and 8 bits, not {spec.bits}", case.spec_fix(bits=nearest_bits(spec.bits)))
    elif spec.bits != 4:
        yield StackFinding("slower", f"its builder was tried only with 4 bits, not with {spec.bits}", case.spec_fix(bits=4))
    group = spec.group_size
    # x & (x - 1) is 0 for powers of two alone
    if group == "channel" or int(group) < 16 or int(group) & (int(group) - 1):
        yield StackFinding("no", f"its block sizes are powers of two of at least 16, not {group}", case.spec_fix(group_size=32))


def _openvino(case: StoredShapes) -> Iterable[StackFinding]:
    spec = case.spec
    if (
        spec.kind != "int"
        or spec.ternary
        or spec.bits > 4
        or not spec.symmetric
        or case.config.model_type not in ("llama", "qwen2", "qwen3")
    ):
        yield StackFinding("slower", "its reader was tried only with Q4_0 of Llama, Qwen2 and Qwen3")


def _mlx(case: StoredShapes) -> Iterable[StackFinding]:
    if case.spec.group_size not in GROUPS:
        groups = ", ".join(map(str, GROUPS))
        yield StackFinding("no", f"it takes groups of {groups}, not {case.spec.group_size}", case.spec_fix(group_size=64))


_SERVER: tuple[Rule, ...] = (_family, _kernel_bits, _marlin_groups, _tensor_parallel, _marlin_widths, _fused, _fixed_head_dim)
_PLAIN_SERVER: tuple[Rule, ...] = (_family, _tensor_parallel, _fixed_head_dim)
_RULES: dict[str, tuple[Rule, ...]] = {
    "vLLM": _SERVER,
    "SGLang": _SERVER,
    "transformers": (_llama_hidden,),
    "llama.cpp": (_narrow_codes,),
    "ONNX Runtime": (_onnx,),
    "OpenVINO": (_narrow_codes, _openvino),
    "mlx-lm": (_mlx,),
}
"""Serving stack -> its rules for packed weights."""
