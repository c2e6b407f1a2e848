"""Reads recipes: ``load_recipe`` from files and shipped names, ``recipe_from_dict`` from data; ``resolved`` turns one back into data.

recipe = load_recipe("quickstart", ["stages.recover.tokens=50k", "trainer.precision=32"])
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .nodes import node_from_python
from .overrides import apply_overrides
from .problems import Problems
from .reading import read_recipe
from .recipe import Recipe, resolved
from .shipped import find_recipe, list_recipes, shipped_text
from .yaml_source import read_yaml_file


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path_or_name: a YAML file (UTF-8, at most 1 MB), or the name of a shipped recipe.
        overrides: ``key=value`` settings that replace the file's, such as ``stages.1.distill.tokens=2B``.

    Raises: UserError with every problem of the file, each with its line, key path and remedy.
    """
    path = find_recipe(str(path_or_name))
    root, problems = read_yaml_file(path, str(path))
    apply_overrides(root, overrides)
    return read_recipe(root, problems, default_name=path.stem)


def recipe_from_dict(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe from plain data (as from ``resolved``, or with values written as in YAML: ``{"tokens": "1M"}``).

    Raises: UserError with every problem, each with its key path.
    """
    root = node_from_python(dict(data))
    apply_overrides(root, overrides)
    return read_recipe(root, Problems("the recipe", root), default_name=None)


__all__ = ["Recipe", "list_recipes", "load_recipe", "recipe_from_dict", "resolved", "shipped_text"]
