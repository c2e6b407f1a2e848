"""Where a run starts: the model that its first stage works on, and where that model's weights were imported from."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.folder.gguf_place import gguf_file
from ...models.folder.import_card import origin_words
from ...models.folder.loading import find_model_folder
from ...models.folder.model_folder import read_record

if TYPE_CHECKING:
    from ...configs.recipe import Recipe

__all__ = ["imported_of", "origin_words", "starting_model", "teacher_adapter_of"]


def starting_model(recipe: "Recipe") -> tuple[str | None, str | None]:
    """(path, revision) of the student, or of the teacher that it is cut from; (None, None) for random weights."""
    # a student cut from the teacher starts from the teacher's weights
    if recipe.student.keep and recipe.teacher:
        return recipe.teacher.path, recipe.teacher.revision
    return recipe.student.path, recipe.student.revision


def imported_of(recipe: "Recipe") -> dict[str, Any]:
    """Entry ``imported`` of the record of the starting model: its GGUF file, adapter or pickled files; {} for any other model.

    Raises:
        UserError: see ``find_model_folder``.
    """
    path, revision = starting_model(recipe)
    if path is None or all(entry.kind == "evaluate" for entry in recipe.stages):
        return {}
    # only the import of a GGUF file says what was in it; of other models the record alone is read
    folder = find_model_folder(path, revision, weights=gguf_file(path) is not None)
    return read_record(folder).get("imported") or {}


def teacher_adapter_of(asked: "Recipe", recipe: "Recipe") -> dict[str, Any]:
    """Entry ``teacher_imported`` of the record: the adapter in the teacher, where models do not start from it; {} without one.

    Args:
        asked: The recipe as given.
        recipe: The same with merged models in place of adapters.
    """
    if recipe.teacher is None or asked.teacher is None or not asked.teacher.adapter or recipe.teacher.path is None:
        return {}
    # a student that is cut from the teacher has it as its own origin
    if starting_model(recipe)[0] == recipe.teacher.path:
        return {}
    return read_record(Path(recipe.teacher.path)).get("imported") or {}
