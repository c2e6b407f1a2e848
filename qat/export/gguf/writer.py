"""The format "gguf": one file ``model.gguf`` with codes and scales as ggml blocks, read by llama.cpp, Ollama and LM Studio.

Nothing is rounded: symmetric codes of up to 4 bits are Q4_0, of 5 bits Q5_0, wider ones Q8_0; asymmetric ones of up to 3 bits Q4_1, of 4
bits Q4_1 or else Q5_1, of 5 bits Q5_1 where that is exact; scales are exact in fp16. The kinds q2_k to q6_k are Q2_K to Q6_K.
mxfp4 is MXFP4. Ternary codes in groups of whole blocks of 256 are TQ2_0, with ``gguf-tq1_0`` the smaller TQ1_0.
``gguf-q2_0`` writes symmetric 2-bit codes as Q2_0, which only llama.cpp of July 2026 or later reads. Embedding and head are BF16 unless
they are quantized, norms and biases F32. ``gguf-bf16``, ``gguf-f16`` and ``gguf-f32`` take a plain model folder.

Source: as in the other modules of this folder, which define layouts and names.
"""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....models.common.errors import UserError
from ....models.folder.structure import plain_config
from ...mixes import found_mix
from ...source.plain_source import PlainSource
from ...source.quantized_source import ExportSource
from ..common import layer
from .blocks import fits_fp16, minimums, pack_q2_0, pack_q4_0, pack_q4_1, pack_q5_0, pack_q5_1, pack_q8_0, symmetric_type
from .container import FILE_TYPES, MIX_FILE_TYPES, TensorPlan, TensorType, Value, planned_file_bytes, write_gguf
from .generation import end_tokens, sampling_metadata
from .metadata import ROPE_FREQS, model_metadata, rope_frequency_factors
from .mxfp4 import pack_mxfp4
from .names import Place, architecture_of, changed, gguf_place
from .super_blocks import SUPER_TYPES, SuperParts, pack_super
from .ternary import pack_tq1_0, pack_tq2_0
from .tokenizer import tokenizer_metadata

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAME = "gguf"
FILE = "model.gguf"
PLAIN_TYPES = {torch.float32: TensorType.F32, torch.float16: TensorType.F16, torch.bfloat16: TensorType.BF16}
# llama.cpp names a file's type after the matrices of the layers, not after these two
_EMBEDDINGS = ("token_embd.weight", "output.weight")
_SYMMETRIC = {
    TensorType.Q2_0: pack_q2_0,
    TensorType.TQ1_0: pack_tq1_0,
    TensorType.TQ2_0: pack_tq2_0,
    TensorType.Q4_0: pack_q4_0,
    TensorType.Q5_0: pack_q5_0,
    TensorType.Q8_0: pack_q8_0,
}
_ASYMMETRIC = {TensorType.Q4_1: pack_q4_1, TensorType.Q5_1: pack_q5_1}


def planned_bytes(source: ExportSource, preferred: TensorType | None = None) -> int:
    """Return the size of ``model.gguf`` in bytes."""
    return planned_file_bytes(*_plan(source, preferred))


def exported_config(source: ExportSource) -> dict[str, Any]:
    """Return ``config.json``, without paths and code. llama.cpp does not read it; tools that rebuild or check the model do."""
    return {key: value for key, value in source.config.items() if key not in ("torch_dtype", "_name_or_path", "auto_map")}


def write(folder: Path, source: ExportSource, preferred: TensorType | None = None) -> None:
    """Write ``model.gguf`` into ``folder``."""
    write_gguf(folder / FILE, *_plan(source, preferred))


def block_type(source: ExportSource, module: str, preferred: TensorType | None = None) -> TensorType:
    """Return the narrowest block type that holds a module's codes; Q2_0 and TQ1_0 only if they are ``preferred``.

    Raises:
        UserError: fp16 does not hold a scale, or a block's minimum (zero point times scale).
    """
    spec = source.state.spec_of(module)
    # its fp16 numbers were checked with the codes
    if spec.super_block:
        return SUPER_TYPES[spec.kind]
    if spec.kind == "mxfp4":
        return TensorType.MXFP4
    held = layer(source, module)
    if not fits_fp16(held.scales.numpy()):
        raise UserError(f"{module}: GGUF stores scales in fp16, which does not hold all of them; quantize with scale_grid='bf16_fp16'")
    if held.zeros is None:
        return symmetric_type(spec, held.codes.shape[1], preferred)
    return _asymmetric_type(module, spec.bits, held.scales.numpy(), held.zeros.numpy())


def _asymmetric_type(module: str, bits: int, scales: NDArray[np.float32], zeros: NDArray[np.int8]) -> TensorType:
    for width, kind in ((4, TensorType.Q4_1), (5, TensorType.Q5_1)):
        # wider blocks shift the codes, which changes the minimum: fp16 may hold one and not the other
        if bits <= width and fits_fp16(minimums(scales, zeros, bits, width)):
            return kind
    raise UserError(
        f"{module}: Q5_1 stores zero point times scale in fp16, which does not hold all of these products, so other weights than the "
        "trained ones would be served; use weights.symmetric=true or weights.bits=4, which are always exact"
    )


def _plan(source: ExportSource, preferred: TensorType | None) -> tuple[dict[str, Value], list[TensorPlan]]:
    """Return metadata and tensors; no weight is read until a tensor is written."""
    config = plain_config(source.folder)
    architecture = architecture_of(config.model_type)
    metadata = model_metadata(config, architecture)
    tensors = [_tensor(source, name, architecture, config, preferred) for name in _order(source)]
    if (factors := rope_frequency_factors(config)) is not None:
        tensors.append(TensorPlan(ROPE_FREQS, TensorType.F32, (len(factors),), lambda: np.array(factors, "<f4")))
    # the tokenizer needs a name for every row of the embedding, and that may be padded
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    general: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": str(source.record.get("run") or config.model_type),
        "general.size_label": _size_label(source.structure.parameters),
        "general.file_type": _file_type(source, architecture, tensors),
        # ggml's GGML_QNT_VERSION
        "general.quantization_version": 2,
        "general.alignment": 32,
    }
    general |= sampling_metadata(source.folder, int(cast(int, metadata[f"{architecture}.context_length"])))
    tokenizer = tokenizer_metadata(source.folder, rows)
    return {**general, **metadata, **tokenizer, **end_tokens(source.folder, config, tokenizer)}, tensors


def _order(source: ExportSource) -> list[str]:
    """Return the names of all weights in module order, tied ones once."""
    return [name for name in source.structure.shapes if name in source.plain or name.removesuffix(".weight") in source.state.codes]


def _tensor(source: ExportSource, name: str, architecture: str, config: "PreTrainedConfig", preferred: TensorType | None) -> TensorPlan:
    place, module, shape = gguf_place(name, architecture), name.removesuffix(".weight"), source.structure.shapes[name]
    if module in source.state.codes:
        kind = block_type(source, module, preferred)
        return TensorPlan(place.name, kind, shape, partial(_blocks, source, module, kind, place, config))
    # GPT-2's Conv1D stores [in, out]; GGUF stores every matrix as [out, in]
    if place.change == "transpose":
        shape = shape[::-1]
    kind = _plain_type(source, place, shape)
    return TensorPlan(place.name, kind, shape, partial(_plain, source, name, kind, place, config))


def _plain_type(source: ExportSource, place: Place, shape: tuple[int, ...]) -> TensorType:
    """Return the type of an unquantized tensor; llama.cpp needs vectors, norms and learned positions in fp32."""
    if len(shape) < 2 or "_norm" in place.name or place.name.startswith("position_embd"):
        return TensorType.F32
    return PLAIN_TYPES[source.dtype] if isinstance(source, PlainSource) else TensorType.BF16


def _blocks(source: ExportSource, module: str, kind: TensorType, place: Place, config: "PreTrainedConfig") -> NDArray[np.uint8]:
    spec = source.state.spec_of(module)
    if spec.super_block:
        return pack_super(spec.kind, _super_parts(source, module, place, config))
    if spec.kind == "mxfp4":
        codes, scales = (changed(part, place.change, config).numpy() for part in source.state.encoded(module)[:2])
        return pack_mxfp4(codes, scales)
    held = layer(source, module)
    # reordered rows take their scales and zero points along
    codes, scales = (changed(tensor, place.change, config).numpy() for tensor in (held.codes, held.scales))
    if held.zeros is not None:
        return _ASYMMETRIC[kind](codes, scales, changed(held.zeros, place.change, config).numpy(), spec.bits)
    return _SYMMETRIC[kind](codes, scales)


def _super_parts(source: ExportSource, module: str, place: Place, config: "PreTrainedConfig") -> SuperParts:
    codes, scales, _, _, sub = source.state.encoded(module)
    assert sub is not None
    held = (codes, scales, sub.scales, sub.minimum, sub.minimums)
    rows = [None if part is None else changed(part, place.change, config).numpy() for part in held]
    return SuperParts(**dict(zip(("codes", "scales", "sub_scales", "minimum", "sub_minimums"), rows)))  # pyright: ignore[reportArgumentType]


def _plain(source: ExportSource, name: str, kind: TensorType, place: Place, config: "PreTrainedConfig") -> NDArray[Any]:
    dtype = next(dtype for dtype, stored in PLAIN_TYPES.items() if stored == kind)
    tensor = changed(source.tensor(name), place.change, config)
    # law 3, docs/architecture.md, for the unquantized tensors: stored values are those that were measured
    stored = tensor.to(dtype).contiguous()
    if not torch.equal(stored.to(torch.float32), tensor.to(torch.float32)):
        raise UserError(
            f"{source.plain[name]}: {name} has values that {kind.name} does not hold, so the export would not be the model that was "
            "measured; quantize the model again (the stages 'qat' and 'quantize' store such tensors on the bf16 grid)"
        )
    return _raw(stored)


def _raw(tensor: Tensor) -> NDArray[Any]:
    # numpy has no bf16: the same bits as uint16
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _file_type(source: ExportSource, architecture: str, tensors: list[TensorPlan]) -> int:
    """Return the number of llama.cpp's mixture, which is recognized by the types of all matrices, or else of the usual type."""
    shapes = {
        name: cast(tuple[int, int], source.structure.shapes[f"{name}.weight"])
        for name in source.structure.linears
        if gguf_place(f"{name}.weight", architecture).name.startswith("blk.")
    }
    specs = {name: source.state.spec_of(name) for name in shapes if name in source.state.codes}
    mix = found_mix(specs, shapes) if specs else None
    return FILE_TYPES[_usual_type(tensors)] if mix is None else MIX_FILE_TYPES[mix]


def _usual_type(tensors: list[TensorPlan]) -> TensorType:
    """Return the type with the most weight elements, embedding and head not counted."""
    counts: Counter[TensorType] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1 and tensor.name not in _EMBEDDINGS:
            counts[tensor.type] += int(np.prod(tensor.shape))
    return counts.most_common(1)[0][0]


def _size_label(parameters: int) -> str:
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if parameters >= unit:
            return f"{parameters / unit:.1f}{name}"
    return f"{parameters / 1000:.0f}K"
