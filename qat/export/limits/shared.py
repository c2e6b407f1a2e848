"""Limits that several formats share."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ....models.fused_linears import FUSED
from ...spec import PACKED_FLOATS, QuantSpec
from .refusal import Beyond, NarrowFfn, OneScheme, OtherFormat, Refusal, Remedy, Skip, Without, listed, weights
from .stored_model import StoredModel, StoredModule

Modules = tuple[StoredModule, ...]
NVFP4_GROUP = 16
"""The one group size of nvfp4."""
FP8_CACHE = Beyond("kv_cache", (("kind", "fp8_e4m3"), ("scaling", "static")))
"""The one rounding of keys and values that servers read from an export."""


def integer_schemes(model: StoredModel) -> Iterator[tuple[QuantSpec, Modules]]:
    """Return the schemes with integer codes and their modules; ``kinds`` refuses those that the format does not hold."""
    return ((spec, modules) for spec, modules in model.schemes() if spec.kind == "int")


def packed(
    model: StoredModel, *, head: bool, fused: bool = True, embedding: bool = False, super_blocks: bool = False, floats: Sequence[str] = ()
) -> Iterator[Refusal]:  # fmt: skip
    """Yield what no format of packed codes can hold.

    Args:
        model: What is to be stored.
        head: Readers support a quantized head.
        fused: Readers fuse q, k, v into one matrix, and gate, up into another.
        embedding: Readers support a quantized embedding.
        super_blocks: The format has super-blocks.
        floats: Kinds that the format holds beside integers.
    """
    # told first: all limits below are about modules
    if not model.modules:
        yield Refusal(reason="packs quantized linears, and the model has none", remedies=(OtherFormat("safetensors"),))
    yield from kinds(model, floats, super_blocks=super_blocks)
    yield from ends(model, head=head, embedding=embedding)
    if fused:
        yield from one_scheme(model, ("int", *floats))


def kinds(model: StoredModel, floats: Sequence[str] = (), *, super_blocks: bool = False) -> Iterator[Refusal]:
    """Yield schemes whose codes are neither integers nor among ``floats``; with ``super_blocks``, those with sub-scales pass."""
    held = f"integer codes and the floats {listed(floats)}" if floats else "integer codes"
    for spec, modules in model.schemes():
        if spec.super_block and not super_blocks:
            others = (OtherFormat("gguf"), weights(kind="int", group_size=128), OtherFormat("safetensors-f32"))
            yield Refusal(reason=f"has no super-blocks, which kind={spec.kind} needs", remedies=others, modules=modules, spec=spec)
        if spec.super_block or spec.kind == "int" or spec.kind in floats:
            continue
        ways: list[Remedy] = [weights(kind="int")]
        # the format of floats, or its kind that is nearest to 16 quantiles: 4 bits and the smallest groups
        if spec.kind in PACKED_FLOATS:
            ways.append(OtherFormat("compressed-tensors"))
        elif "nvfp4" in floats and not any(module.columns % NVFP4_GROUP for module in modules):
            ways.insert(0, weights(kind="nvfp4", group_size=NVFP4_GROUP))
        ways.append(OtherFormat("safetensors-f32"))
        yield Refusal(reason=f"holds {held}, not kind={spec.kind}", remedies=tuple(ways), modules=modules, spec=spec)


def without_ends(model: StoredModel, *, head: bool) -> StoredModel:
    """Return the model without the embedding and, unless ``head``, without the head: ``ends`` has refused them, so other limits skip
    them."""
    left_out = {model.embedding} if head else {model.embedding, model.head}
    return replace(model, modules=tuple(module for module in model.modules if module.name not in left_out))


def ends(model: StoredModel, *, head: bool, embedding: bool) -> Iterator[Refusal]:
    """Yield a quantized embedding or head that readers take for an unquantized one."""
    for module in model.modules:
        if module.name == model.embedding and not embedding:
            ways: tuple[Remedy, ...] = (Without("embedding"), OtherFormat("gguf"))
            yield Refusal(reason="has readers that expect an unquantized embedding", remedies=ways, modules=(module,))
        # one stored table cannot be packed for the head and plain for the embedding
        if module.name == model.head and model.tied:
            reason = "cannot hold a quantized head that is tied to the embedding (tie_word_embeddings)"
            yield Refusal(reason=reason, remedies=(Without("head"),), modules=(module,))
        elif module.name == model.head and not head:
            ways = (Without("head"), OtherFormat("compressed-tensors"))
            yield Refusal(reason="has readers that expect an unquantized head", remedies=ways, modules=(module,))


def one_scheme(model: StoredModel, held: Sequence[str] = ("int",)) -> Iterator[Refusal]:
    """Yield parts of a matrix that servers fuse, if what is stored of their schemes differs. Unquantized parts are no limit of the format:
    ``launch/plan/stack_rules.py`` judges how each server reads them."""
    # the other kinds are refused by ``kinds``
    by_name = {module.name: module for module in model.modules if module.spec.kind in held}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in by_name):
        for names in FUSED:
            own = [by_name[f"{parent}.{name}"] for name in names if f"{parent}.{name}" in by_name]
            # a fused matrix is one tensor with one width and one group size; its parts' scales may have been found differently
            if len({module.spec.as_stored() for module in own}) > 1:
                # one example is enough: every layer usually has the same difference
                other = next(module for module in own if module.spec.as_stored() != own[0].spec.as_stored())
                each = " and ".join(f"{module.name.rpartition('.')[2]} {module.spec.words()}" for module in (own[0], other))
                reason = f"is read by servers that make one matrix of {', '.join(names)}, and {each} differ"
                yield Refusal(reason=reason, remedies=(OneScheme(names),), modules=(other,))
                return


def scale_grid(
    model: StoredModel, stored: str, grids: Sequence[str], *, by_values: bool, held: Sequence[str] = ("int",)
) -> Iterator[Refusal]:  # fmt: skip
    """Yield schemes whose scales the format's 16-bit float does not hold.

    Args:
        model: What is to be stored.
        stored: The format's name for that float.
        grids: Values of ``scale_grid`` whose scales the float holds.
        by_values: As in ``Refusal``.
        held: Kinds whose scales the format stores in that float.
    """
    for spec, modules in model.schemes():
        if spec.kind in held and spec.scale_grid not in grids:
            reason = f"stores scales in {stored}, which does not hold scale_grid={spec.scale_grid}"
            # the grid that every format holds
            way = weights(scale_grid="bf16_fp16")
            yield Refusal(reason=reason, remedies=(way,), modules=modules, spec=spec, by_values=by_values)


def fp16_scales(model: StoredModel) -> Iterator[Refusal]:
    """Yield schemes whose scales fp16 may not hold; by values, because an fp32 scale may happen to be an fp16 number."""
    return scale_grid(model, "fp16", ("bf16_fp16", "bf16", "fp16"), by_values=True)


def bits(model: StoredModel, widths: Sequence[int]) -> Iterator[Refusal]:
    """Yield schemes of a bit width that the format does not pack."""
    for spec, modules in integer_schemes(model):
        if spec.bits not in widths:
            reason, way = f"packs {listed(widths)} bits, not {spec.bits}", weights(bits=nearest_bits(spec.bits, widths))
            yield Refusal(reason=reason, remedies=(way,), modules=modules, spec=spec)


def nearest_bits(asked: int, widths: Sequence[int] = (4, 8)) -> int:
    """Return 4 or 8, which every serving stack reads: the nearer width that the format packs; of two equally near, the wider."""
    return min((width for width in (4, 8) if width in widths), key=lambda width: (abs(width - asked), -width))


def nothing_beyond_weights(model: StoredModel) -> Iterator[Refusal]:
    """Yield rounded inputs, keys and values that the format cannot describe: servers would compute another model."""
    # the only format whose config describes both
    other = OtherFormat("compressed-tensors")
    if model.kv_cache is not None:
        said = "cannot record that keys and values are rounded (kv_cache), so servers would compute another model"
        yield Refusal(reason=said, remedies=(other, Without("kv_cache")))
    if model.activations is not None:
        said = "cannot record that inputs are rounded (activations), so servers would compute another model"
        yield Refusal(reason=said, remedies=(other, Without("activations")))


def multiples(model: StoredModel, reason: str, odd: Sequence[StoredModule], unit: int, *others: Remedy) -> Refusal:
    """Return the refusal of modules with a side that is no multiple of ``unit``. Remedies: a narrower FFN if only FFN modules are
    concerned, or to leave the modules unquantized.

    Args:
        model: What is to be stored.
        reason: Reason for the first module.
        odd: All modules concerned; a remedy must cover every one.
        unit: Required divisor of the side.
        others: Further remedies.
    """
    ways: list[Remedy] = []
    # pruning narrows the FFN alone, so it helps only where all odd sides are the FFN's
    if model.ffn is not None and all(module.kind.startswith("mlp.") for module in odd):
        ways.append(NarrowFfn(multiple_near(model.ffn, unit)))
    ways.append(Skip(tuple(dict.fromkeys(f"*.{module.kind}" if module.kind != module.name else module.name for module in odd))))
    return Refusal(reason=reason, remedies=(*ways, *others), modules=tuple(odd))


def multiple_near(size: int, unit: int) -> int:
    """Return the largest multiple of ``unit`` up to ``size``; ``unit`` itself if ``size`` is smaller."""
    return max(unit, size // unit * unit)
