"""The record of zeros: which matrices' exact zeros are a mask (decoct.json, ``sparse``).

Whoever writes a model folder carries the record of its input on, cut to what is left. Whoever trains keeps the zeros that it names: a
matrix that is not named has zeros by chance, and training moves them.
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
"""Share of exact zeros from which a model looks pruned: trained weights hold next to none."""


def sparse_modules(path: str | Path, revision: str | None = None) -> list[str]:
    """Matrices whose exact zeros are a mask, as decoct.json of a model folder or hub id lists them; [] where it lists none.

    Raises:
        UserError: there is no such model, or the list is none.
    """
    folder = find_model_folder(path, revision, weights=False)
    names = read_record(folder).get("sparse", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / RECORD}: 'sparse' must be a list of module names, not {names!r:.80}; make the folder again")
    return list(names)


def check_sparse(names: Iterable[str], model: "PreTrainedModel") -> None:
    """UserError when a listed matrix is no linear layer of the model: its zeros could not be kept."""
    linears = decoder_linears(model)
    if lost := [name for name in names if name not in linears]:
        raise UserError(
            f"decoct.json lists {lost[0]} as sparse, but the model has no such linear layer; the folder was put together from two"
        )


def joined(carried: Sequence[str], new: Sequence[str]) -> list[str]:
    """The record of a model that was sparse in ``carried`` and has become so in ``new``."""
    return [*new, *(name for name in carried if name not in new)]


def of_kept_layers(names: Iterable[str], family: Family, kept: Sequence[int]) -> list[str]:
    """The record of a student that has the layers ``kept`` of its teacher, under their new numbers."""
    return [renamed for name in names if (renamed := family.renumbered(name, kept)) is not None]


def unlisted_zeros(model: "PreTrainedModel", names: Iterable[str]) -> float:
    """Share of exact zeros of the decoder's linear weights that no record names; 0.0 on the meta device."""
    import torch

    weights = [linear.weight for name, linear in decoder_linears(model).items() if name not in set(names)]
    total = sum(weight.numel() for weight in weights if not weight.is_meta)
    zeros = sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in weights if not weight.is_meta)
    return zeros / total if total else 0.0
