"""Puts merged model folders in the place of ``student.adapter`` and ``teacher.adapter``."""

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...configs.recipe import Recipe
    from .session import Session


def with_adapters(recipe: "Recipe", session: "Session") -> "Recipe":
    """The recipe whose models have their adapters in them: merged on rank 0, once, into the cache that all ranks share.

    Raises:
        UserError: an adapter cannot be merged.
    """
    sections = {name: section for name in ("student", "teacher") if (section := getattr(recipe, name)) is not None and section.adapter}
    if not sections:
        return recipe

    def merge() -> dict[str, str]:
        # imported late: it reads weights, and so needs torch
        from ...models.folder.adapted import adapted_folder

        return {name: str(adapted_folder(one.path, one.adapter, one.revision)) for name, one in sections.items()}

    places = session.on_first(merge)
    merged = {name: replace(one, path=places[name], adapter=None, revision=None) for name, one in sections.items()}
    return replace(recipe, **merged)
