"""The format "gguf": one file ``model.gguf`` with codes and scales as ggml blocks, read by llama.cpp, Ollama and LM Studio.

Nothing is rounded: symmetric codes of up to 4 bits are Q4_0, wider ones Q8_0, asymmetric 4-bit ones Q4_1 where that is exact; scales
are exact in fp16. Embedding and head are BF16, norms and biases F32. ``gguf-bf16``, ``gguf-f16`` and ``gguf-f32`` take a plain model
folder.

Source: layouts and names as in ``gguf_format``, ``gguf_blocks``, ``gguf_names``, ``gguf_metadata``, ``gguf_tokenizer``.
"""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...models.errors import UserError
from ..structure import plain_config
from .gguf_blocks import BLOCK, fits_fp16, minimums, pack_q4_0, pack_q4_1, pack_q8_0
from .gguf_format import FILE_TYPES, TensorPlan, TensorType, Value, planned_file_bytes, write_gguf
from .gguf_metadata import ROPE_FREQS, model_metadata, rope_frequency_factors
from .gguf_names import Place, architecture_of, changed, place_of
from .gguf_tokenizer import tokenizer_metadata
from .plain_source import PlainSource
from .source import ExportSource, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAME = "gguf"
FILE = "model.gguf"
PLAIN_TYPES = {torch.float32: TensorType.F32, torch.float16: TensorType.F16, torch.bfloat16: TensorType.BF16}
PLAIN_FORMATS = {"gguf-f32": torch.float32, "gguf-f16": torch.float16, "gguf-bf16": torch.bfloat16}
"""Names of the formats that take a plain model folder."""
_EMBEDDINGS = ("token_embd.weight", "output.weight")


def open_codes(folder: Path) -> ExportSource:
    """``open_source``, whose refusal of a folder without codes also names the formats that take one."""
    try:
        return open_source(folder)
    except UserError as error:
        if "holds no codes" not in str(error):
            raise
        raise UserError(f"{error} Weights as they are can be exported with --format {', '.join(PLAIN_FORMATS)}.") from error


def check(source: ExportSource) -> None:
    """Refuse what the format or llama.cpp cannot hold exactly.

    Raises:
        UserError: an unknown family, a lattice, width or scale that ggml's blocks do not hold (naming the module and the nearest legal
            setting), a config that llama.cpp computes otherwise, or a tokenizer it has no equal of.
    """
    for module in source.state.modules:
        block_type(source, module)
    _plan(source)


def planned_bytes(source: ExportSource) -> int:
    """Size of ``model.gguf``."""
    return planned_file_bytes(*_plan(source))


def exported_config(source: ExportSource) -> dict[str, Any]:
    """``config.json`` beside the file: llama.cpp does not read it; whoever rebuilds or checks the model does. No path, no code."""
    return {key: value for key, value in source.config.items() if key not in ("torch_dtype", "_name_or_path", "auto_map")}


def write(folder: Path, source: ExportSource) -> None:
    """Write ``model.gguf`` into ``folder``."""
    write_gguf(folder / FILE, *_plan(source))


def block_type(source: ExportSource, module: str) -> TensorType:
    """Which blocks hold the codes of a module.

    Raises:
        UserError: none does.
    """
    state, spec = source.state, source.state.spec_of(module)
    columns, groups = state.codes[module].shape[1], state.scales[module].shape[1]
    if columns % BLOCK:
        nearest = max(BLOCK, columns // BLOCK * BLOCK)
        fix = f"prune to a multiple (prune.structured.ffn={nearest})" if "mlp." in module else "prune to a multiple"
        raise UserError(f"{module} has {columns} inputs; GGUF's blocks hold {BLOCK} along a row: {fix}, or skip the module")
    if columns // groups % BLOCK:
        raise UserError(
            f"{module}: a GGUF block of {BLOCK} weights has one scale, groups are of {columns // groups}; use group_size={BLOCK}"
        )
    if spec.kind != "int":
        raise UserError(f"{module}: gguf holds integer codes, not kind={spec.kind!r}")
    if not fits_fp16(state.scales[module].numpy()):
        raise UserError(f"{module}: GGUF stores scales in fp16, which does not hold all of them; quantize with scale_grid='bf16_fp16'")
    if module not in state.zero_points:
        return TensorType.Q4_0 if spec.bits <= 4 else TensorType.Q8_0
    if spec.bits > 4:
        raise UserError(f"{module}: GGUF holds asymmetric codes of 4 bits at most, not {spec.bits}; use symmetric=true, or bits=4")
    if not fits_fp16(minimums(state.scales[module].numpy(), state.zero_points[module].numpy())):
        raise UserError(
            f"{module}: Q4_1 stores zero point times scale in fp16, which does not hold all of these products, so other weights than the "
            "trained ones would be served; use symmetric=true, which is always exact"
        )
    return TensorType.Q4_1


def _plan(source: ExportSource) -> tuple[dict[str, Value], list[TensorPlan]]:
    """Metadata and tensors; no weight is read."""
    config = plain_config(source.folder)
    architecture = architecture_of(config.model_type)
    metadata = model_metadata(config, architecture)
    tensors = [_tensor(source, name, architecture, config) for name in _order(source)]
    if (factors := rope_frequency_factors(config)) is not None:
        tensors.append(TensorPlan(ROPE_FREQS, TensorType.F32, (len(factors),), lambda: np.array(factors, "<f4")))
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    general: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": str(source.record.get("run") or config.model_type),
        "general.size_label": _size_label(source.structure.parameters),
        "general.file_type": FILE_TYPES[_usual_type(tensors)],
        "general.quantization_version": 2,
        "general.alignment": 32,
    }
    return {**general, **metadata, **tokenizer_metadata(source.folder, rows)}, tensors


def _order(source: ExportSource) -> list[str]:
    """Names of all weights in the order of the model, tied ones once."""
    return [name for name in source.structure.shapes if name in source.plain or name.removesuffix(".weight") in source.state.codes]


def _tensor(source: ExportSource, name: str, architecture: str, config: "PreTrainedConfig") -> TensorPlan:
    place, module, shape = place_of(name, architecture), name.removesuffix(".weight"), source.structure.shapes[name]
    if module in source.state.codes:
        kind = block_type(source, module)
        return TensorPlan(place.name, kind, shape, partial(_blocks, source, module, kind, place, config))
    if place.change == "transpose":
        shape = shape[::-1]
    kind = _plain_type(source, place, shape)
    return TensorPlan(place.name, kind, shape, partial(_plain, source, name, kind, place, config))


def _plain_type(source: ExportSource, place: Place, shape: tuple[int, ...]) -> TensorType:
    """llama.cpp wants vectors, norms and learned positions in fp32."""
    if len(shape) < 2 or "_norm" in place.name or place.name.startswith("position_embd"):
        return TensorType.F32
    return PLAIN_TYPES[source.dtype] if isinstance(source, PlainSource) else TensorType.BF16


def _blocks(source: ExportSource, module: str, kind: TensorType, place: Place, config: "PreTrainedConfig") -> NDArray[np.uint8]:
    state = source.state
    codes, scales = (changed(tensor[module], place.change, config).numpy() for tensor in (state.codes, state.scales))
    if kind == TensorType.Q4_1:
        return pack_q4_1(codes, scales, changed(state.zero_points[module], place.change, config).numpy())
    return pack_q4_0(codes, scales) if kind == TensorType.Q4_0 else pack_q8_0(codes, scales)


def _plain(source: ExportSource, name: str, kind: TensorType, place: Place, config: "PreTrainedConfig") -> NDArray[Any]:
    dtype = next(dtype for dtype, stored in PLAIN_TYPES.items() if stored == kind)
    tensor = changed(source.tensor(name), place.change, config)
    stored = tensor.to(dtype).contiguous()
    if not torch.equal(stored.to(torch.float32), tensor.to(torch.float32)):
        raise UserError(
            f"{source.plain[name]}: {name} has values that {kind.name} does not hold, so the export would not be the model that was "
            "measured; quantize the model again (the stages 'qat' and 'quantize' store such tensors on the bf16 grid)"
        )
    return _raw(stored)


def _raw(tensor: Tensor) -> NDArray[Any]:
    # numpy has no bf16
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _usual_type(tensors: list[TensorPlan]) -> TensorType:
    """The type of most layers' weights, by bytes' worth of elements."""
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
