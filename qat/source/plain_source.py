"""An unquantized model folder as the source of an export; its weights are rounded once to the stored dtype."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...models.common.errors import UserError
from ...models.common.json_file import read_json, what_instead
from ...models.folder.folder_checks import checked_places
from ...models.folder.structure import model_structure
from ..codes.state import QuantState
from ..spec import QuantSpec
from .quantized_source import ExportSource
from .stored_tensors import check_tied, stored_files

# elements: 32 MB in fp64
_PIECE = 2**22


@dataclass(frozen=True, kw_only=True)
class PlainSource(ExportSource):
    """A checked model folder without codes; ``state`` has no modules."""

    dtype: torch.dtype
    """Dtype to which matrices are rounded (to nearest, ties to even); vectors stay in fp32."""

    def tensor(self, name: str) -> Tensor:
        """Return a weight in fp32 with the values that the export stores; UserError if it is not finite, or overflows in ``dtype``."""
        stored = super().tensor(name)
        # norms and biases: llama.cpp needs them in fp32
        if stored.ndim < 2:
            return stored.float()
        return self._in_range(name, stored.to(self.dtype)).float()

    def _in_range(self, name: str, rounded: Tensor) -> Tensor:
        """Return ``rounded``, a weight in the stored dtype; UserError if a value has overflowed."""
        # a number beyond the range becomes infinite
        if not bool(torch.isfinite(rounded).all()):
            raise UserError(f"{self.plain[name]}: {name} has values beyond the range of {rounded.dtype}; export in another type")
        return rounded

    def rounding(self) -> "CastError":
        """Measure how far the export's weights are from the folder's."""
        changed, largest, squares, errors = 0, 0.0, 0.0, 0.0
        for name in self.plain:
            for piece, rounded in zip(super().tensor(name).flatten().split(_PIECE), self.tensor(name).flatten().split(_PIECE)):
                # in pieces and in fp64: no second copy of a large tensor, and no rounding in the sums
                difference = (piece.double() - rounded.double()).abs()
                changed += int((difference > 0).sum())
                largest = max(largest, float(difference.max()) if difference.numel() else 0.0)
                squares += float(piece.double().square().sum())
                errors += float(difference.square().sum())
        return CastError(changed=changed, largest=largest, relative=math.sqrt(errors / squares) if squares else 0.0)


@dataclass(frozen=True, kw_only=True)
class CastError:
    """Error of rounding to the stored dtype."""

    changed: int
    """Elements whose value changed."""
    largest: float
    """Largest absolute change."""
    relative: float
    """Norm of all changes divided by the norm of all weights."""

    def __str__(self) -> str:
        return (
            f"{self.changed:,} weights were rounded to the stored dtype, by {self.largest:.2g} at most ({self.relative:.2g} of their norm)"
        )


def open_plain_source(folder: Path, dtype: torch.dtype) -> PlainSource:
    """Read and check a model folder with plain weights.

    Raises:
        UserError: no such folder, damaged files, or tensors that do not belong to the model of config.json.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder (no config.json); {what_instead(folder)}")
    # names, shapes and ties are checked against the config; weights are read when they are written
    found = checked_places(folder)
    structure = model_structure(folder)
    stored = stored_files(found, structure)
    problems = structure.differences(stored.shapes)
    if problems:
        raise UserError(
            f"{folder}: {problems[0]} ({len(problems)} differences in all); weights and config.json are not of one model, or named in an "
            "older way: then load and save the model with transformers once"
        )
    check_tied(folder, stored, structure)
    return PlainSource(
        folder=folder,
        config=read_json(folder / "config.json"),
        record=stored.record(folder),
        # no modules: exporters of packed weights never get here
        state=QuantState(spec=QuantSpec(), modules=(), codes={}, scales={}),
        structure=structure,
        plain={name: file for name, file in stored.files.items() if name not in structure.tied},
        names_in_files=stored.other_names,
        dtype=dtype,
    )
