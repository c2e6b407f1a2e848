"""A quantized folder as the source of an export: its codes, and its other tensors, which are read only when they are written."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.common.errors import UserError
from ...models.common.json_file import read_json, what_instead
from ...models.folder.folder_checks import checked_places
from ...models.folder.structure import Structure, model_structure
from ...models.folder.weights import read_tensor
from ..codes.state import QuantState, load_quant_state
from .stored_tensors import check_tied, stored_files

Load = Callable[[Path], QuantState]
"""Reads and proves the codes of a folder."""


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """A checked quantized folder: its weights are codes times scales, and they match its config."""

    folder: Path
    config: dict[str, Any]
    """Content of ``config.json``."""
    record: dict[str, Any]
    """Content of ``decoct.json``."""
    state: QuantState
    structure: Structure
    plain: dict[str, Path]
    """Unquantized tensors: name -> the file that holds it, in file order. Tied names are left out."""
    names_in_files: dict[str, str] = field(default_factory=dict)
    """Names of unquantized tensors -> their names in the folder's files, where these differ."""
    reader_version: str | None = None
    """Version of the format's package that will read the export, if the user named one; needed where layouts differ between versions."""

    @property
    def unquantized_linears(self) -> list[str]:
        """Return the linears that are not quantized (the head and skipped ones), in module order."""
        quantized = set(self.state.modules)
        return [name for name in self.structure.linears if name not in quantized]

    def also_in_model(self, modules: Iterable[str]) -> list[str]:
        """Return ``modules`` and also their names in the model where those differ: readers look for either."""
        inside = self.structure.modules
        return [name for module in modules for name in (module, *([inside[module]] if module in inside else []))]

    def tensor(self, name: str) -> Tensor:
        """Return an unquantized tensor as stored; UserError if it has NaN or infinite values."""
        # read anew each time: an export writes each tensor once, and memory holds one
        tensor = read_tensor(self.plain[name], self.names_in_files.get(name, name))
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{self.plain[name]}: {name} holds NaN or infinite values; take an earlier checkpoint")
        return tensor


def open_source(folder: Path, load: Load = load_quant_state) -> ExportSource:
    """Read and check a quantized folder.

    Args:
        folder: A folder that the stage ``qat`` or ``quantize`` wrote.
        load: Reads and proves its codes.

    Raises:
        UserError: no such folder, no codes in it (run qat or quantize), damaged or foreign files, codes out of range, scales that are
            not finite and positive, weights other than codes times scales, or tensors that do not belong to the model of config.json.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is not a model folder (no config.json); {what_instead(folder)}; 'qat' and 'quantize' write quantized ones"
        )
    # 1. codes, proven against the weights
    state = load(folder)
    found = checked_places(folder)
    # 2. names and shapes against the config, under the names that transformers writes
    structure = model_structure(folder)
    state, stored = state.renamed(structure.stored_modules()), stored_files(found, structure)
    problems = structure.differences(stored.shapes)
    known = {*structure.linears, structure.embedding}
    # codes of a foreign module would be exported under a name that no runtime looks up
    problems += [f"{name} is quantized, but no linear of the model" for name in state.modules if name not in known]
    if problems:
        more = f" ({len(problems)} differences in all)" if len(problems) > 1 else ""
        raise UserError(f"{folder}: {problems[0]}{more}; weights and config.json are not of one model. Quantize the model again.")
    check_tied(folder, stored, structure)
    # their weights go out as codes; what is left is stored as it is
    quantized = {f"{name}.weight" for name in state.modules}
    return ExportSource(
        folder=folder,
        config=read_json(folder / "config.json"),
        record=stored.record(folder),
        state=state,
        structure=structure,
        plain={name: file for name, file in stored.files.items() if name not in quantized and name not in structure.tied},
        names_in_files=stored.other_names,
    )
