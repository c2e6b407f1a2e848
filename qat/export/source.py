"""The quantized folder that is exported: its codes, and every other tensor, read when it is written."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.errors import UserError
from ...models.folder import read_record
from ...models.folder_check import check_model_folder
from ...models.safetensors_file import read_header
from ..state import QuantState, load_quant_state
from ..structure import Structure, model_structure


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """A checked quantized folder: codes times scales are its weights, and its weights are what its config asks for."""

    folder: Path
    config: dict[str, Any]
    """``config.json`` as it is."""
    record: dict[str, Any]
    """``decoct.json`` as it is."""
    state: QuantState
    structure: Structure
    plain: dict[str, Path]
    """Unquantized tensors: name -> the file that holds it, in file order. Tied names are left out."""
    reader_version: str | None = None
    """Version of the format's package that will read the export, where layouts differ between versions and the user named one."""

    @property
    def unquantized_linears(self) -> list[str]:
        """Linears that stay as they are: the head and what was skipped, in module order."""
        quantized = set(self.state.modules)
        return [name for name in self.structure.linears if name not in quantized]

    def tensor(self, name: str) -> Tensor:
        """An unquantized tensor as it is stored; UserError when it holds NaN or infinite values."""
        tensor = _read(self.plain[name], name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{self.plain[name]}: {name} holds NaN or infinite values; take an earlier checkpoint")
        return tensor


def open_source(folder: Path) -> ExportSource:
    """Read and check a quantized folder.

    Raises:
        UserError: no such folder, no codes in it (run qat or quantize), damaged or foreign files, codes out of range, scales that are
            not finite and positive, weights other than codes times scales, or tensors that config.json does not ask for.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder (no config.json); give the folder that a stage 'qat' or 'quantize' wrote")
    state = load_quant_state(folder)
    headers = {file: read_header(file).tensors for file in check_model_folder(folder)}
    structure = model_structure(folder)
    files = {name: file for file, tensors in headers.items() for name in tensors}
    shapes = {name: headers[file][name].shape for name, file in files.items()}
    problems = structure.differences(shapes)
    known = {*structure.linears, structure.embedding}
    problems += [f"{name} is quantized, but no linear of the model" for name in state.modules if name not in known]
    if problems:
        more = f" ({len(problems)} differences in all)" if len(problems) > 1 else ""
        raise UserError(f"{folder}: {problems[0]}{more}; weights and config.json are not of one model. Quantize the model again.")
    check_tied(folder, files, structure)
    quantized = {f"{name}.weight" for name in state.modules}
    return ExportSource(
        folder=folder,
        config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
        record=read_record(folder),
        state=state,
        structure=structure,
        plain={name: file for name, file in files.items() if name not in quantized and name not in structure.tied},
    )


def check_tied(folder: Path, files: dict[str, Path], structure: Structure) -> None:
    """A tied weight that is stored under a second name must repeat the first: it is written once."""
    for name in structure.tied & set(files):
        copies = [other for other in files if other not in structure.tied and structure.shapes[other] == structure.shapes[name]]
        if not any(torch.equal(_read(files[name], name), _read(files[other], other)) for other in copies):
            raise UserError(
                f"{folder}: {name} is stored with values of its own, but config.json ties it (tie_word_embeddings); "
                "set tie_word_embeddings to false or remove the tensor"
            )


def _read(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)
