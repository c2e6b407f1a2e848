"""Checks the models that a recipe starts from before anything else; a refusal names an input that works."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...models.common.errors import UserError
from .shapes import config_of
from .stage_shapes import ImpossibleStageError

if TYPE_CHECKING:
    from ...configs.recipe import Recipe


def check_inputs(recipe: "Recipe") -> None:
    """Refuse a teacher or student that no stage can work on.

    Raises:
        ImpossibleStageError: an adapter, packed weights, a model of more than text, weights of another model than config.json,
            or windows longer than its table of positions.
        UserError: its config cannot be found.
    """
    from ...models.folder.gguf_place import gguf_file
    from ...models.folder.hub import local_folder
    from ...models.folder.refused_inputs import check_files, check_text_model
    from ...models.positions import check_positions

    for key, adapter in (("student.adapter", recipe.student.adapter), ("teacher.adapter", recipe.teacher and recipe.teacher.adapter)):
        if adapter:
            from ...models.folder.adapted import check_adapter

            try:
                check_adapter(adapter, key)
            except UserError as error:
                raise ImpossibleStageError(str(error)) from error
    for key, path, revision, trained in _models(recipe):
        # a GGUF file is refused by its own reader, on opening; only the header is read
        if (file := gguf_file(path)) is not None:
            from ...models.folder.gguf_folder import open_gguf

            try:
                open_gguf(file)
                check_positions(path, config_of(path)[0], recipe.data.seq_length)
            except UserError as error:
                raise ImpossibleStageError(f"{key}: {error}") from error
            continue
        # None: it is on the hub, and then its config alone is looked at
        folder = local_folder(path, revision=revision)
        try:
            if folder is not None and trained:
                check_files(folder)
        except UserError as error:
            raise ImpossibleStageError(f"{key}: {error}") from error
        config, _ = config_of(path, revision)
        try:
            check_text_model(path, config)
            # other weight files are converted, and checked, when they are opened
            if folder is not None and trained and any(folder.glob("*.safetensors")):
                from ...models.folder.name_checks import check_weight_names

                check_weight_names(path, folder)
            # a table of learned positions has no row for a later position
            check_positions(path, config, recipe.data.seq_length)
        except UserError as error:
            raise ImpossibleStageError(f"{key}: {error}") from error


def _models(recipe: "Recipe") -> Iterator[tuple[str, str, str | None, bool]]:
    """Yield (recipe key, folder or hub id, revision, whether its weights must be plain) of teacher and student."""
    if recipe.teacher and recipe.teacher.path:
        yield "teacher.path", recipe.teacher.path, recipe.teacher.revision, True
    if recipe.student.path:
        # packed exports can be evaluated, but not trained
        worked_on = any(entry.kind != "evaluate" for entry in recipe.stages)
        yield "student.path", recipe.student.path, recipe.student.revision, worked_on
