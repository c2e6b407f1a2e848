"""Keeps the held-out text of a run folder that an earlier version of decoct began, so that its finished stages stay finished."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...trainer.data.split import WORDS

if TYPE_CHECKING:
    from ...configs.recipe import Recipe


def with_split(recipe: "Recipe", run_dir: Path) -> "Recipe":
    """The recipe with ``data.held_out`` filled in: as given, else as the run folder began, else the default.

    A run folder that names no rule was begun when text was held out from its end. It keeps that as long as the rest of its ``data`` section
    is the same; other text is split anew in any case.
    """
    from ...configs.recipe import resolved

    if recipe.data.held_out is None and (before := _data_of(run_dir)) is not None:
        now = resolved(recipe)["data"]
        # keys that this version has and the earlier one had not are at their defaults, or the text is another one
        same = all(before.get(key) == now.get(key) for key in before.keys() - {"held_out"})
        if same and before.get("held_out") in (None, "end"):
            return replace(recipe, data=replace(recipe.data, held_out="end"))
    return replace(recipe, data=replace(recipe.data, held_out=recipe.data.held_out_rule))


def kept_words(recipe: "Recipe", asked: "Recipe", description: str) -> str | None:
    """A sentence when a run keeps an earlier split inside a document that the default would not make; else None."""
    if (
        asked.data.held_out is not None
        or asked.data.kind == "chat"
        or recipe.data.held_out != "end"
        or not description.endswith(WORDS["end"])
    ):
        return None
    return (
        "held out is the end of the text, as when this run folder was begun; data.held_out=blocks holds out windows from all over the text "
        "and runs its stages again, and so does another run folder (--out)"
    )


def _data_of(run_dir: Path) -> dict[str, Any] | None:
    """The ``data`` section of the recipe that the run folder was last started with; None if there is none to read."""
    import yaml

    try:
        plain = yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    data = plain.get("data") if isinstance(plain, dict) else None
    return data if isinstance(data, dict) else None
