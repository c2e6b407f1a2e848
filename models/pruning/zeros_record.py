"""The record of zeros: the matrices whose exact zeros are a mask (decoct.json, ``sparse``).

A stage that writes a model folder copies the record of its input, without removed matrices. A stage that trains keeps the zeros of the
listed matrices; the zeros of other matrices are there by chance, and training changes them.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import UserError
from ..families import Family, decoder_linears
from ..folder.loading import find_model_folder
from ..folder.model_folder import RECORD, read_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLD_FROM = 0.05
"""Share of exact zeros from which a model looks pruned: trained weights hold almost none."""


def sparse_modules(path: str | Path, revision: str | None = None) -> list[str]:
    """The matrices whose exact zeros are a mask, from decoct.json of a model folder or hub id; [] if it lists none.

    Raises:
        UserError: there is no such model, or the entry is not a list of names.
    """
    folder = find_model_folder(path, revision, weights=False)
    names = read_record(folder).get("sparse", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / RECORD}: 'sparse' must be a list of module names, not {names!r:.80}; make the folder again")
    return list(names)


def check_sparse(names: Iterable[str], model: "PreTrainedModel") -> None:
    """Raises UserError if a listed matrix is not a linear layer of the model, so that its zeros could not be kept."""
    linears = decoder_linears(model)
    if lost := [name for name in names if name not in linears]:
        raise UserError(
            f"decoct.json lists {lost[0]} as sparse, but the model has no such linear layer: the folder mixes two models. Make it again"
        )


def joined(carried: Sequence[str], new: Sequence[str]) -> list[str]:
    """The record of a model that was sparse in ``carried`` and is now sparse in ``new`` too."""
    # without duplicates, the newest stage first
    return [*new, *(name for name in carried if name not in new)]


def of_kept_layers(names: Iterable[str], family: Family, kept: Sequence[int]) -> list[str]:
    """The record of a student with the layers ``kept`` of its teacher, under their new numbers."""
    # a layer that was dropped has no new name, and so no entry
    return [renamed for name in names if (renamed := family.renumbered(name, kept)) is not None]


def unlisted_zeros(model: "PreTrainedModel", names: Iterable[str]) -> float:
    """Share of exact zeros in the decoder's linear weights that the record does not list; 0.0 on the meta device."""
    import torch

    listed = set(names)
    weights = [linear.weight for name, linear in decoder_linears(model).items() if name not in listed]
    total = sum(weight.numel() for weight in weights if not weight.is_meta)
    zeros = sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in weights if not weight.is_meta)
    return zeros / total if total else 0.0
