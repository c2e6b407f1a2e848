"""The figures of one model folder, as a row of the report."""

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
from .figures import evaluate_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.windows import Windows


def best_device() -> str:
    """'cuda' when there is a GPU, else 'cpu'."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_for_measuring(path: str, revision: str | None = None) -> "PreTrainedModel":
    """Any model folder, hub id or export as a plain fp32 model; exports are rebuilt by the independent reader.

    Of fp32 folders transformers maps the files, so that a model quantized layer by layer can be measured where memory does not hold it.
    """
    if is_existing_export(path):
        return load_exported_model(Path(path))
    model = load_model(path, dtype=torch.float32, revision=revision)
    check_head(model)
    check_causal(model, f"the model in {path}")
    if rounds_more_than_weights(quant_record(path)):
        round_as_stored(model, load_quant_state(Path(path)))
    return model


def is_existing_export(path: str) -> bool:
    """Whether a local folder (or GGUF file) holds packed weights."""
    from ...models.common.errors import UserError
    from ...qat.readers.open import is_export as has_packed_weights

    try:
        return Path(path).exists() and has_packed_weights(Path(path))
    except UserError:
        return False


def measure_teacher(path: str, revision: str | None, v_eff: int) -> LocalTeacher:
    """The teacher in fp32, against which models are measured."""
    from ...models.teachers import load_teacher

    return load_teacher(path, dtype=torch.float32, v_eff=v_eff, revision=revision, device=best_device())


def measure_model(model: "PreTrainedModel", teacher: LocalTeacher | None, windows: "Windows") -> dict[str, Any]:
    """Figures of a model in memory: parameters, sparsity, quality and the seconds the measuring took."""
    started = time.perf_counter()
    device = best_device()
    model.to(torch.device(device))  # pyright: ignore[reportArgumentType] - transformers' wrapper hides the signature of nn.Module.to
    result = evaluate_model(model, teacher, windows, device=device)
    return {
        "parameters": count_parameters(model),
        "sparsity": linear_sparsity(model),
        "layer_sparsity": layer_sparsity(model),
        "eval": {name: getattr(result, name) for name in ("perplexity", "kl", "kl_p99", "top1", "ece")},
        "eval_tokens": result.tokens,
        "eval_seconds": time.perf_counter() - started,
    }


def measure_folder(path: str, teacher: LocalTeacher | None, windows: "Windows", revision: str | None = None) -> dict[str, Any]:
    """A row: the model's figures and the bytes of its weight files (None for a hub id, whose files are not ours to count).

    ``packed_bytes`` is what the model takes where it is served: of a folder with codes an export's size, of any other its own.
    """
    model = open_for_measuring(path, revision)
    row = measure_model(model, teacher, windows)
    size = folder_bytes(Path(path)) if Path(path).is_dir() else None
    quant = None if is_existing_export(path) else quant_record(path)
    packed = size if quant is None else packed_bytes(model, quant)
    return {**row, **_sizes("", size, row["parameters"]), **_sizes("packed_", packed, row["parameters"])}


def _sizes(name: str, size: int | None, parameters: int) -> dict[str, Any]:
    return {f"{name}bytes": size, f"{name}bits_per_weight": None if size is None else bits_per_weight(size, parameters)}


def too_large_to_measure(path: str, revision: str | None = None) -> str | None:
    """Why a folder cannot be measured: figures are taken in fp32, and memory does not hold that. None when it can, or who knows.

    fp32 folders take no memory of their own (transformers maps their files), nor does the copy on a GPU count.
    """
    room = available_bytes()
    if room is None or is_existing_export(path):
        return None
    files = weight_files(find_model_folder(path, revision, weights=True))
    stored = [info for file in files for info in read_header(file).tensors.values() if info.dtype != "F32"]
    needed = sum(4 * math.prod(info.shape) for info in stored)
    if needed <= room:
        return None
    return f"its weights take {needed / 1e9:.1f} GB in fp32, and {room / 1e9:.1f} GB of memory are free"


def layer_sparsity(model: "PreTrainedModel") -> list[float]:
    """Share of zeros of the linear weights of each decoder layer, in order."""
    zeros: dict[int, list[int]] = {}
    for name, module in decoder_linears(model).items():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        seen = zeros.setdefault(numbers[0] if numbers else 0, [0, 0])
        seen[0] += int((module.weight == 0).sum())
        seen[1] += module.weight.numel()
    return [zeros[layer][0] / zeros[layer][1] for layer in sorted(zeros)]


def quant_record(path: str) -> dict[str, Any] | None:
    """The QuantSpec record of a quantized folder, None for any other."""
    return read_record(Path(path)).get("quant") if Path(path).is_dir() else None
