"""Reads recipes: ``load_recipe`` from files and shipped names, ``recipe_from_dict`` from data; ``resolved`` turns one back into data.

recipe = load_recipe("quickstart", ["stages.recover.tokens=50k", "trainer.precision=32"])
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .nodes import Node, node_from_python
from .outlines import forget_parts
from .overrides import Override, apply_overrides, key_of, place_of_override
from .own_parts import Tell, load_parts
from .problems import Problems
from .reading import read_recipe
from .recipe import Recipe, resolved
from .shipped import find_recipe, list_recipes, shipped_text
from .yaml_source import read_yaml_file


def load_recipe(path_or_name: str | Path, overrides: Sequence[Override] = (), *, tell: Tell | None = None) -> Recipe:
    """Read and validate a recipe. Files that it imports are run.

    Args:
        path_or_name: a YAML file (UTF-8, at most 1 MB), or the name of a shipped recipe.
        overrides: ``key=value`` settings that replace the file's, such as ``stages.1.distill.tokens=2B``, or pairs of key and value.
        tell: Called with the path of an imported file before it is run.

    Raises: UserError with every problem of the file, each with its line, key path and remedy.
    """
    path = find_recipe(str(path_or_name))
    root, problems = read_yaml_file(path, str(path))
    # a recipe without a name takes that of its file
    return _read(root, problems, overrides, path.parent, tell, default_name=path.stem)


def recipe_from_dict(data: Mapping[str, Any], overrides: Sequence[Override] = (), *, tell: Tell | None = None) -> Recipe:
    """Return a recipe from plain data (as from ``resolved``, or with values written as in YAML: ``{"tokens": "1M"}``).

    Paths of its ``import`` are relative to the working directory.

    Raises: UserError with every problem, each with its key path.
    """
    root = node_from_python(dict(data))
    # no file, so messages have no lines, and the name must be in the data
    return _read(root, Problems("the recipe", root), overrides, Path(), tell, default_name=None)


def outline_of(path: Path) -> Recipe:
    """Return a recipe for a look at its stages: files that it imports are not run, and what they register is replaced by parts of decoct.

    Raises: as for ``load_recipe``.
    """
    root, problems = read_yaml_file(path, str(path))
    forget_parts(root)
    # no overrides and no parts: the run folder holds a resolved recipe, and nobody's code runs for a look at it
    return read_recipe(root, problems, default_name=path.stem)


def _read(
    root: Node, problems: Problems, overrides: Sequence[Override], folder: Path, tell: Tell | None, *, default_name: str | None
) -> Recipe:
    # the imported files first: the other overrides may address what they register
    imports = [one for one in overrides if key_of(one) == "import"]
    apply_overrides(root, imports)
    parts = load_parts(root, folder, tell, overridden=[place_of_override(one) for one in imports])
    apply_overrides(root, [one for one in overrides if key_of(one) != "import"], parts)
    return read_recipe(root, problems, default_name=default_name, parts=parts)


__all__ = ["Recipe", "list_recipes", "load_recipe", "outline_of", "recipe_from_dict", "resolved", "shipped_text"]
