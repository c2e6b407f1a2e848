"""Size of a model: parameters, bytes of its weight files, bits per weight, share of zeros.

Tied tensors count once. Bits per weight include embeddings: they are most of the bytes of a small quantized model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..models.common.errors import UserError
from ..models.families import decoder_linears
from ..models.folder.codes_file import OLD_CODES
from .layers.quantized_model import QuantLinear
from .spec import QuantSpec
from .stored_bytes import packed_matrix_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHT_SUFFIXES = (".safetensors", ".gguf")


def weight_files(path: Path) -> list[Path]:
    """Return the files of a model folder (or the one file) from which a runtime reads weights, sorted.

    The file of codes is excluded: it holds the same weights as codes, for export.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    # sorted, so that a message names the same file on every file system
    candidates = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    files = [file for file in candidates if file.suffix in _WEIGHT_SUFFIXES and file.name != OLD_CODES]
    if not files:
        raise UserError(f"{path} holds no weight files ({' or '.join('*' + s for s in _WEIGHT_SUFFIXES)}); give a model folder")
    return files


def folder_bytes(path: Path) -> int:
    """Return the bytes of the weight files of a model folder.

    Raises:
        UserError: there is none.
    """
    return sum(file.stat().st_size for file in weight_files(path))


def bits_per_weight(size_bytes: int, parameters: int) -> float:
    """Return 8 x bytes / parameters; ``parameters`` counts the whole model, embeddings included."""
    return 8.0 * size_bytes / parameters


def packed_bytes(model: nn.Module, record: Mapping[str, Any]) -> int:
    """Return the bytes of a quantized model's tensors as exports pack them: codes in words, scales, zero points, the rest in 16 bits.

    Args:
        model: Plain model with the weights of a quantized folder.
        record: The ``quant`` entry of its ``decoct.json``.
    """
    spec = QuantSpec.from_json(record["spec"])
    own = {name: QuantSpec.from_json(fields) for name, fields in (record.get("own_specs") or {}).items()}
    modules = dict(model.named_modules())
    weights = {name: getattr(modules.get(name), "weight", None) for name in record["modules"]}
    # by identity: named modules repeat a tied weight, ``parameters`` yields it once
    packed = {id(weight): own.get(name, spec) for name, weight in weights.items()}
    return sum(packed_matrix_bytes(p.shape, packed.get(id(p))) for p in model.parameters())


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; a tensor used in several places counts once. Buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def linear_sparsity(model: "PreTrainedModel") -> float:
    """Return the share of exact zeros among the weights of the decoder's linears, without embeddings and head; 0.0 without linears.

    For a ``QuantLinear`` the quantized weights count (codes times scales), not the latent ones: they are stored and served, and rounding
    makes zeros too.
    """
    zeros = total = 0
    for module in decoder_linears(model).values():
        weight = module.quantized_weight() if isinstance(module, QuantLinear) else module.weight
        zeros += int((weight == 0).sum())
        total += weight.numel()
    return zeros / total if total else 0.0
