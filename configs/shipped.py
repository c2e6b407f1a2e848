"""The recipes that come with decoct (``configs/*.yaml`` and ``configs/recipes/*.yaml``, named by their file names' stems) and their schema.

The first line of each names the schema for editors (the YAML language server's way): ``# yaml-language-server: $schema=FILE``.
"""

from pathlib import Path

from ..models.common.errors import UserError
from .problems import did_you_mean

_HERE = Path(__file__).resolve().parent
SCHEMA_FILE = _HERE / "recipe.schema.json"
"""The JSON Schema of recipes, equal to what ``json_schema.py`` makes."""
_FOR_EDITORS = "# yaml-language-server: $schema="


def shipped_recipes() -> dict[str, Path]:
    """Return name -> file, the quickstart first."""
    # the folder configs itself has the quickstart alone, so it comes first
    files = [*sorted(_HERE.glob("*.yaml")), *sorted((_HERE / "recipes").glob("*.yaml"))]
    return {file.stem: file for file in files}


def list_recipes() -> list[tuple[str, Path, str]]:
    """Return (name, file, description) of every shipped recipe; the description is its first comment line that is not for editors."""
    return [(name, path, _about(path)) for name, path in shipped_recipes().items()]


def _about(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next((line for line in lines if not line.startswith(_FOR_EDITORS)), "")
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def with_schema(text: str, schema: str) -> str:
    """Return a recipe's text with a first line that names ``schema``, a path from the recipe's folder or a URL."""
    # a line that names another schema is replaced, so that a copy of a copy has one
    body = text.partition("\n")[2] if text.startswith(_FOR_EDITORS) else text
    return f"{_FOR_EDITORS}{schema}\n{body}"


def shipped_text(name: str) -> str:
    """Return the text of a shipped recipe with its comments; UserError with the most similar name and the list if there is none."""
    known = shipped_recipes()
    if name not in known:
        raise UserError(f"no shipped recipe is called '{name}'{did_you_mean(name, known) or ';'} shipped: {', '.join(known)}")
    return known[name].read_text(encoding="utf-8")


def find_recipe(path_or_name: str) -> Path:
    """Return the file of a path or a shipped name; a file with that name comes first. UserError if there is neither."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    known = shipped_recipes()
    if path_or_name in known:
        return known[path_or_name]
    if path.is_dir():
        # the likely mistake: the path of a model where a recipe is meant
        model = f" ('decoct footprint {path_or_name}' says what the model in it takes)" if (path / "config.json").is_file() else ""
        raise UserError(f"{path_or_name} is a folder{model}; give a recipe file in it, or one of the shipped recipes: {', '.join(known)}")
    if path.exists():
        raise UserError(f"{path_or_name} is no regular file; give a recipe file, or one of the shipped recipes: {', '.join(known)}")
    # both with and without the ending: quickstrt.yaml and smollm2-1.7b-hlf, whose version number looks like an ending
    hint = did_you_mean(path.name.removesuffix(path.suffix) or path_or_name, known) or did_you_mean(path.name, known)
    raise UserError(f"there is no recipe file '{path_or_name}' and no shipped recipe of that name{hint or ';'} shipped: {', '.join(known)}")
