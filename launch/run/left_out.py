"""Tensors in the files of the starting model that transformers does not load. No stage writes them.

Examples are heads that predict further tokens (multi-token prediction) and vision towers. They are not copied into the results: such a head
was trained on hidden states that every stage changes, and servers would expect it to be quantized like the rest. The run reports them.
"""

from typing import TYPE_CHECKING

from ...models.folder.loading import find_model_folder, load_config, meta_model
from ...models.folder.model_folder import read_record
from ...models.folder.stored_names import left_out_words, not_loaded, summary
from ...models.folder.weights import WeightFiles
from .origin import starting_model

if TYPE_CHECKING:
    from ...configs.recipe import Recipe

__all__ = ["left_out_of", "left_out_words"]


def left_out_of(recipe: "Recipe") -> dict[str, int]:
    """Return the number of such tensors by the part they belong to, in the student or the teacher that it is cut from; usually {}.

    Raises:
        UserError: see ``check_model_folder``.
    """
    if all(entry.kind == "evaluate" for entry in recipe.stages):
        return {}
    path, revision = starting_model(recipe)
    if path is None:
        return {}
    folder = find_model_folder(path, revision, weights=True)
    # a folder that decoct wrote has left them out already; its record says what the original had
    if known := read_record(folder).get("left_out"):
        return known
    with WeightFiles(folder) as files:
        return summary(not_loaded(meta_model(load_config(folder)), files.names()))
