"""Figures of one model folder: a row of the report."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...models.causality import check_causal
from ...models.common.host_memory import available_bytes
from ...models.families import check_head, decoder_linears
from ...models.folder.loading import find_model_folder, load_model
from ...models.folder.model_folder import read_record
from ...models.folder.safetensors_read import read_header
from ...models.teachers import LocalTeacher
from ...qat.codes.state import load_quant_state
from ...qat.footprint import bits_per_weight, count_parameters, folder_bytes, linear_sparsity, packed_bytes, weight_files
from ...qat.layers.as_stored import round_as_stored, rounds_more_than_weights
from ...qat.rebuild import load_exported_model
from .figures import Progress, evaluate_model
from .spread import EVAL_FIGURES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.windows import Windows


def best_device() -> str:
    """'cuda' when there is a GPU, else 'cpu'."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_for_measuring(path: str, revision: str | None = None) -> "PreTrainedModel":
    """Open any model folder, hub id or export as a plain fp32 model on the CPU. Exports are rebuilt by the independent reader.

    transformers maps the files of fp32 folders, so that a model quantized layer by layer can be measured even if it is larger than memory.
    """
    if is_existing_export(path):
        return load_exported_model(Path(path))
    model = load_model(path, dtype=torch.float32, revision=revision)
    # figures come from hidden states and the head: a model whose logits are something else would get wrong ones
    check_head(model)
    check_causal(model, f"the model in {path}")
    # weights are stored rounded already; inputs, keys and values are rounded in the forward pass
    if rounds_more_than_weights(quant_record(path)):
        round_as_stored(model, load_quant_state(Path(path)))
    return model


def is_existing_export(path: str) -> bool:
    """Whether a local folder (or GGUF file) holds packed weights that decoct exported; a GGUF file of others is imported."""
    from ...models.common.errors import UserError
    from ...models.folder.gguf_place import gguf_file
    from ...qat.readers.open import is_export as has_packed_weights

    try:
        if (file := gguf_file(path)) is not None:
            return "export" in read_record(file.parent)
        return Path(path).exists() and has_packed_weights(Path(path))
    except UserError:
        return False


def measure_teacher(path: str, revision: str | None, v_eff: int) -> LocalTeacher:
    """Load the teacher in fp32, as the reference for measurements."""
    from ...models.teachers import load_teacher

    return load_teacher(path, dtype=torch.float32, v_eff=v_eff, revision=revision, device=best_device())


def measure_model(
    model: "PreTrainedModel", teacher: LocalTeacher | None, windows: "Windows", progress: Progress | None = None
) -> dict[str, Any]:
    """Measure a model in memory: parameters, sparsity (shares), quality (``EvalResult``) and the time in seconds."""
    started = time.perf_counter()
    device = best_device()
    model.to(torch.device(device))  # pyright: ignore[reportArgumentType] - transformers' wrapper hides the signature of nn.Module.to
    result = evaluate_model(model, teacher, windows, device=device, progress=progress)
    return {
        "parameters": count_parameters(model),
        "sparsity": linear_sparsity(model),
        "layer_sparsity": layer_sparsity(model),
        "eval": {name: getattr(result, name) for name in EVAL_FIGURES},
        "blocks": result.blocks,
        "eval_tokens": result.tokens,
        "eval_seconds": time.perf_counter() - started,
    }


def measure_folder(
    path: str, teacher: LocalTeacher | None, windows: "Windows", revision: str | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Row of the report: figures of the model and the bytes of its weight files (None for a hub id, whose files are not counted).

    ``packed_bytes`` is the size of the served model: the size of an export for a folder with codes, the folder's own size otherwise.
    """
    model = open_for_measuring(path, revision)
    row = measure_model(model, teacher, windows, progress)
    size = folder_bytes(Path(path)) if Path(path).exists() else None
    # an export is packed already: its own size counts
    quant = None if is_existing_export(path) else quant_record(path)
    packed = size if quant is None else packed_bytes(model, quant)
    return {**row, **_sizes("", size, row["parameters"]), **_sizes("packed_", packed, row["parameters"])}


def _sizes(name: str, size: int | None, parameters: int) -> dict[str, Any]:
    return {f"{name}bytes": size, f"{name}bits_per_weight": None if size is None else bits_per_weight(size, parameters)}


def too_large_to_measure(path: str, revision: str | None = None) -> str | None:
    """Reason why a folder is too large to be measured in fp32; None when it fits, or when the free memory is unknown.

    Only weights stored in other dtypes count: transformers maps fp32 files. The copy on a GPU does not count either.
    """
    room = available_bytes()
    if room is None or is_existing_export(path):
        return None
    files = weight_files(find_model_folder(path, revision, weights=True))
    # headers alone are read: dtypes and shapes, no weights
    stored = [info for file in files for info in read_header(file).tensors.values() if info.dtype != "F32"]
    needed = sum(4 * math.prod(info.shape) for info in stored)
    if needed <= room:
        return None
    return f"its weights take {needed / 1e9:.1f} GB in fp32, and {room / 1e9:.1f} GB of memory are free"


def layer_sparsity(model: "PreTrainedModel") -> list[float]:
    """Share of exact zeros in the linear weights of each decoder layer, in order."""
    zeros: dict[int, list[int]] = {}
    for name, module in decoder_linears(model).items():
        # the first number in a module name is the layer: model.layers.3.mlp.experts.7.up_proj
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        seen = zeros.setdefault(numbers[0] if numbers else 0, [0, 0])
        seen[0] += int((module.weight == 0).sum())
        seen[1] += module.weight.numel()
    return [zeros[layer][0] / zeros[layer][1] for layer in sorted(zeros)]


def quant_record(path: str) -> dict[str, Any] | None:
    """The ``quant`` record of a quantized folder; None for any other folder or a hub id."""
    return read_record(Path(path)).get("quant") if Path(path).is_dir() else None
