"""Checks a recipe's model against the exporters' limits of formats, from shapes alone and before training."""

from dataclasses import replace
from typing import TYPE_CHECKING

from ...qat.export.limits.formats import refusals
from ...qat.export.limits.refusal import sentence
from ...qat.export.limits.stored_model import StoredModel, StoredModule
from .quantized_shapes import quantized_linears

if TYPE_CHECKING:
    from ...qat.spec import ActivationSpec
    from .recipe_remedies import RecipeRemedies

MOST = 8
"""Largest number of sentences: a reader fixes one and plans again."""


def planned_model(
    remedies: "RecipeRemedies",
    *,
    activations: "ActivationSpec | None" = None,
    kv_cache: "ActivationSpec | None" = None,
    reader_version: str | None = None,
    allow_inexact: bool = False,
) -> StoredModel:
    """Describe an export for the limits of formats.

    Args:
        remedies: The export's remedies, which name the model and its scheme.
        activations: How inputs are rounded.
        kv_cache: How keys and values are rounded.
        reader_version: As in the export's settings.
        allow_inexact: As in the export's settings.

    Raises:
        ValueError: a pattern of the scheme changes nothing, or two change one module differently.
    """
    model = remedies.model
    quantized = quantized_linears(model, remedies.scheme)
    return StoredModel(
        modules=tuple(StoredModule(name=name, spec=one.spec, rows=one.rows, columns=one.columns) for name, one in quantized.items()),
        config=model.config,
        tensors=tuple(model.tensors),
        embedding=model.embedding,
        head=model.head,
        # a head without a name of its own is the embedding's table
        tied=not model.head,
        activations=activations,
        kv_cache=kv_cache,
        reader_version=reader_version,
        allow_inexact=allow_inexact,
        # a remedy that narrows the FFN is proposed only where a stage could do it
        ffn=None if model.family.refusal("prune channels") else model.dimensions.ffn,
    )


def format_problems(stored: StoredModel, remedies: "RecipeRemedies") -> list[str]:
    """Return a sentence, with the nearest working setting, for each thing that a format cannot hold; [] if every format holds everything.

    Args:
        stored: The model to export.
        remedies: How remedies are written.
    """
    found = [refusal for form in remedies.formats for refusal in refusals(form, stored)]
    # a remedy must be enough alone: one that kept another refused format would fail again
    words = replace(remedies, refused=frozenset(refusal.format for refusal in found))
    return [sentence(refusal, words) for refusal in found][:MOST]
