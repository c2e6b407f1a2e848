"""Tensors of the model that a run starts from which transformers does not load, and which no stage therefore writes.

Heads that predict further tokens (multi-token prediction) and vision towers lie beside the model. They are not copied through: a head was
trained on hidden states that every stage changes, and servers would take it for quantized as the rest is. What is left out is said.
"""

from typing import TYPE_CHECKING

from ...models.folder.loading import find_model_folder, load_config, meta_model
from ...models.folder.model_folder import read_record
from ...models.folder.stored_names import left_out_words, not_loaded, summary
from ...models.folder.weights import WeightFiles

if TYPE_CHECKING:
    from ...configs.recipe import Recipe

__all__ = ["left_out_of", "left_out_words"]


def left_out_of(recipe: "Recipe") -> dict[str, int]:
    """Number of such tensors by what they belong to, of the student or the teacher that it is cut from; {} as a rule.

    Raises:
        UserError: see ``check_model_folder``.
    """
    if all(entry.kind == "evaluate" for entry in recipe.stages):
        return {}
    path, revision = recipe.student.path, recipe.student.revision
    # a student cut from the teacher loses what the teacher's files hold beside the model
    if recipe.student.keep and recipe.teacher:
        path, revision = recipe.teacher.path, recipe.teacher.revision
    if path is None:
        return {}
    folder = find_model_folder(path, revision, weights=True)
    # a folder that decoct wrote has left them out already; its record says what the original had
    if known := read_record(folder).get("left_out"):
        return known
    with WeightFiles(folder) as files:
        return summary(not_loaded(meta_model(load_config(folder)), files.names()))
