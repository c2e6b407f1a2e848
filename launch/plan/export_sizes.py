"""Bytes of an export, predicted from shapes: the exporters' own rules for what a format stores, and the tokenizer where it is at hand."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.common.errors import UserError
from ...qat.export.gguf.blocks import PREFERRED, symmetric_type
from ...qat.export.gguf.container import ALIGNMENT, BLOCKS, TensorType
from ...qat.export.gguf.super_blocks import SUPER_TYPES
from ...qat.export.stored_parts import PARTS, StoredTensor
from .disk import model_bytes, safetensors_bytes
from .quantized_shapes import Quantized, quantized_linears
from .shapes import ModelShape

if TYPE_CHECKING:
    from ...configs.recipe import Recipe
    from ...qat.scheme import QuantScheme
    from ...qat.spec import ActivationSpec

_BASE_TOKENS, _BASE_TOKEN_BYTES = 256, 14
"""Tokens of one byte, and the bytes that a GGUF file has for each: length, text and type."""


def export_bytes(
    form: str,
    shape: ModelShape,
    scheme: "QuantScheme",
    *,
    activations: "ActivationSpec | None" = None,
    kv_cache: "ActivationSpec | None" = None,
    tokenizer: Path | None = None,
) -> int:
    """Return the bytes of the weight files of an export.

    Args:
        form: The format, a key of ``EXPORTERS``.
        shape: The exported model.
        scheme: The scheme of its weights.
        activations: How inputs are rounded.
        kv_cache: How keys and values are rounded.
        tokenizer: Folder with the model's tokenizer, which a GGUF file holds; None where it is not at hand: then it is estimated.
    """
    if form in ("gguf", *PREFERRED):
        return _gguf_bytes(shape, scheme, tokenizer, PREFERRED.get(form))
    if form not in PARTS:
        return model_bytes(shape, "F32" if form == "safetensors-f32" else "BF16")
    stored: dict[str, StoredTensor] = {}
    quantized = quantized_linears(shape, scheme)
    for name, (rows, columns, spec) in quantized.items():
        parts = PARTS[form](rows, columns, spec, activations)
        stored |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    if kv_cache is not None and kv_cache.scaling == "static":
        # one scale for the keys and one for the values of each layer
        stored |= {f"{shape.inside}{layer}.self_attn.{part}_scale": ("F32", (1,)) for layer in range(shape.layers) for part in "kv"}
    # everything else is stored in bf16, as the exporters do
    plain = {name: ("BF16", sizes) for name, sizes in shape.tensors.items() if name.removesuffix(".weight") not in quantized}
    return safetensors_bytes(stored | plain)


def tokenizer_folder(recipe: "Recipe") -> Path | None:
    """Return the local folder with the run's tokenizer; None if it is on the hub, or is trained by the run."""
    from ...models.folder.gguf_place import gguf_file
    from ...models.folder.hub import local_folder

    # the student's own tokenizer first; a student that is made from the teacher takes the teacher's
    for model in (recipe.student, recipe.teacher):
        if model is not None and model.path:
            file = gguf_file(model.path)
            if file is None:
                return local_folder(model.path, revision=model.revision)
            # here and not above: reading a GGUF file needs torch, which a plan of other models does without
            from ...models.folder.gguf_folder import cached_folder

            return cached_folder(file, "tokenizer")
    return None


def _gguf_bytes(shape: ModelShape, scheme: "QuantScheme", tokenizer: Path | None, preferred: TensorType | None) -> int:
    quantized = quantized_linears(shape, scheme)
    total = _gguf_header_bytes(shape, tokenizer)
    for name, sizes in shape.tensors.items():
        one = quantized.get(name.removesuffix(".weight"))
        if one is not None:
            kind = _block_type(one, preferred)
        else:
            # llama.cpp wants vectors in fp32
            kind = TensorType.F32 if len(sizes) == 1 else TensorType.BF16
        # whole blocks: ``BLOCKS`` has the elements and the bytes of one
        elements, size = BLOCKS[kind]
        data = math.prod(sizes) // elements * size
        # 64: the tensor's name, shape and offset in the file's table
        total += 64 + -(-data // ALIGNMENT) * ALIGNMENT
    return total


def _block_type(one: Quantized, preferred: TensorType | None) -> TensorType:
    if one.spec.super_block:
        return SUPER_TYPES[one.spec.kind]
    if one.spec.kind == "mxfp4":
        return TensorType.MXFP4
    # 4 bits with zero points fit Q4_1 only if fp16 holds every minimum, which only values can tell
    wide = TensorType.Q4_1 if one.spec.bits <= 3 else TensorType.Q5_1
    return symmetric_type(one.spec, one.columns, preferred) if one.spec.symmetric else wide


def _gguf_header_bytes(shape: ModelShape, tokenizer: Path | None) -> int:
    """Return the bytes of a GGUF file's metadata, most of which are the tokenizer's."""
    from ...qat.export.gguf.container import header_bytes
    from ...qat.export.gguf.tokenizer import tokenizer_metadata

    rows = shape.vocabulary
    if tokenizer is not None:
        try:
            return len(header_bytes(tokenizer_metadata(tokenizer, rows), []))
        except UserError:
            # a tokenizer that GGUF cannot hold is refused by name elsewhere; here only its size is wanted
            pass
    # a longer token also has a merge, and tokens get longer as the vocabulary grows: 27 bytes each in one of 300 and 33 in one of 8,192
    # (byte-level BPE trained on Python source)
    longer = max(0, rows - _BASE_TOKENS)
    return _BASE_TOKEN_BYTES * min(rows, _BASE_TOKENS) + int(longer * (18 + 1.2 * math.log2(max(2, rows))))
