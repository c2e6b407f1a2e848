"""Limits that several formats share."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ....models.fused_linears import FUSED
from ...spec import QuantSpec
from .refusal import Beyond, NarrowFfn, OneScheme, OtherFormat, Refusal, Remedy, Skip, Without, listed, weights
from .stored_model import StoredModel, StoredModule

Modules = tuple[StoredModule, ...]
FP8_CACHE = Beyond("kv_cache", (("kind", "fp8_e4m3"), ("scaling", "static")))
"""Keys and values as servers read them from an export."""


def integer_schemes(model: StoredModel) -> Iterator[tuple[QuantSpec, Modules]]:
    """The quantization schemes of integer codes; ``integers`` refuses the others."""
    return ((spec, modules) for spec, modules in model.schemes() if spec.kind == "int")


def packed(model: StoredModel, *, head: bool, fused: bool = True, embedding: bool = False) -> Iterator[Refusal]:
    """What every format of packed integer codes asks for.

    Args:
        model: What is to be stored.
        head: Readers know a quantized head.
        fused: Readers make one matrix of q, k, v and of gate, up.
        embedding: Readers know a quantized embedding.
    """
    if not model.modules:
        yield Refusal(reason="packs quantized linears, and the model has none", remedies=(OtherFormat("safetensors"),))
    yield from integers(model)
    yield from ends(model, head=head, embedding=embedding)
    if fused:
        yield from one_scheme(model)


def integers(model: StoredModel) -> Iterator[Refusal]:
    """Codes of another kind than int."""
    for spec, modules in model.schemes():
        if spec.kind != "int":
            ways = (weights(kind="int"), OtherFormat("safetensors-f32"))
            yield Refusal(reason=f"holds integer codes, not kind={spec.kind}", remedies=ways, modules=modules, spec=spec)


def without_ends(model: StoredModel, *, head: bool) -> StoredModel:
    """The model less the embedding and, unless readers know it, the head: nothing more is said of what is refused as a whole."""
    left_out = {model.embedding} if head else {model.embedding, model.head}
    return replace(model, modules=tuple(module for module in model.modules if module.name not in left_out))


def ends(model: StoredModel, *, head: bool, embedding: bool) -> Iterator[Refusal]:
    """A quantized embedding or head that readers take for a plain one."""
    for module in model.modules:
        if module.name == model.embedding and not embedding:
            ways: tuple[Remedy, ...] = (Without("embedding"), OtherFormat("gguf"))
            yield Refusal(reason="has readers that take the embedding for a plain table", remedies=ways, modules=(module,))
        if module.name == model.head and model.tied:
            reason = "cannot hold a quantized head that is tied to the embedding (tie_word_embeddings)"
            yield Refusal(reason=reason, remedies=(Without("head"),), modules=(module,))
        elif module.name == model.head and not head:
            ways = (Without("head"), OtherFormat("compressed-tensors"))
            yield Refusal(reason="has readers that take the head for a plain matrix", remedies=ways, modules=(module,))


def one_scheme(model: StoredModel) -> Iterator[Refusal]:
    """Parts of one matrix of servers with different quantization schemes. Parts that are all left alone, or some of them, are no matter of
    the format: what a server makes of those, ``launch/plan/stack_rules.py`` says."""
    by_name = {module.name: module for module in model.modules if module.spec.kind == "int"}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in by_name):
        for names in FUSED:
            own = [by_name[f"{parent}.{name}"] for name in names if f"{parent}.{name}" in by_name]
            if len({module.spec for module in own}) > 1:
                other = next(module for module in own if module.spec != own[0].spec)
                each = " and ".join(f"{module.name.rpartition('.')[2]} {module.spec.words()}" for module in (own[0], other))
                reason = f"is read by servers that make one matrix of {', '.join(names)}, and {each} differ"
                yield Refusal(reason=reason, remedies=(OneScheme(names),), modules=(other,))
                return


def scale_grid(model: StoredModel, stored: str, grids: Sequence[str], *, by_values: bool) -> Iterator[Refusal]:
    """Scales that the 16-bit float of the format does not hold.

    Args:
        model: What is to be stored.
        stored: What the format calls that float.
        grids: Values of ``scale_grid`` whose scales it holds.
        by_values: As in ``Refusal``.
    """
    for spec, modules in integer_schemes(model):
        if spec.scale_grid not in grids:
            reason = f"stores scales in {stored}, which does not hold scale_grid={spec.scale_grid}"
            way = weights(scale_grid="bf16_fp16")
            yield Refusal(reason=reason, remedies=(way,), modules=modules, spec=spec, by_values=by_values)


def fp16_scales(model: StoredModel) -> Iterator[Refusal]:
    """``scale_grid`` of the formats that store fp16: an fp32 scale may happen to be one."""
    return scale_grid(model, "fp16", ("bf16_fp16", "bf16", "fp16"), by_values=True)


def bits(model: StoredModel, widths: Sequence[int]) -> Iterator[Refusal]:
    """Codes of a width that the format does not pack."""
    for spec, modules in integer_schemes(model):
        if spec.bits not in widths:
            reason, way = f"packs {listed(widths)} bits, not {spec.bits}", weights(bits=nearest_bits(spec.bits, widths))
            yield Refusal(reason=reason, remedies=(way,), modules=modules, spec=spec)


def nearest_bits(asked: int, widths: Sequence[int] = (4, 8)) -> int:
    """4 or 8, which every serving stack reads: the nearer one that the format packs, the wider of two as near."""
    return min((width for width in (4, 8) if width in widths), key=lambda width: (abs(width - asked), -width))


def nothing_beyond_weights(model: StoredModel) -> Iterator[Refusal]:
    """A format without words for rounded inputs, or for rounded keys and values: servers would compute another model."""
    other = OtherFormat("compressed-tensors")
    if model.kv_cache is not None:
        said = "cannot say that keys and values are rounded (kv_cache), so servers would compute another model"
        yield Refusal(reason=said, remedies=(other, Without("kv_cache")))
    if model.activations is not None:
        said = "cannot say that inputs are rounded (activations), so servers would compute another model"
        yield Refusal(reason=said, remedies=(other, Without("activations")))


def multiples(model: StoredModel, reason: str, odd: Sequence[StoredModule], unit: int, *others: Remedy) -> Refusal:
    """The refusal of modules with a side that is no multiple of ``unit``: a narrower FFN where that is all there is, or leave them out.

    Args:
        model: What is to be stored.
        reason: Of the first of them.
        odd: All of them, as one of them alone would leave the others.
        unit: What the side must be a multiple of.
        others: Further remedies.
    """
    ways: list[Remedy] = []
    if model.ffn is not None and all(module.kind.startswith("mlp.") for module in odd):
        ways.append(NarrowFfn(multiple_near(model.ffn, unit)))
    ways.append(Skip(tuple(dict.fromkeys(f"*.{module.kind}" if module.kind != module.name else module.name for module in odd))))
    return Refusal(reason=reason, remedies=(*ways, *others), modules=tuple(odd))


def multiple_near(size: int, unit: int) -> int:
    """The next multiple below, or above where there is none."""
    return max(unit, size // unit * unit)
