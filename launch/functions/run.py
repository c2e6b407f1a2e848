"""``decoct.run``: a recipe from Python, by the same code as the verb ``decoct run``."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.errors import DecoctError, GateFailed, UserError
from .arguments import as_out, as_path
from .results import RunResult

if TYPE_CHECKING:
    from ...configs.overrides import Override
    from ...configs.recipe import Recipe


def run(
    recipe: "str | os.PathLike[str] | Mapping[str, Any] | Recipe",
    *,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> RunResult:
    """Run a recipe: every stage in order, skipping finished stages and resuming interrupted ones; then write the report.

    Args:
        recipe: A recipe file, the name of a shipped recipe, a dict as a recipe file would hold it, or a ``Recipe``.
        out: Run folder. Default: ``runs/NAME``.
        quiet: Print nothing.
        overrides: Settings of the recipe: ``seed=1``, ``trainer={"precision": "32"}`` (merged into the section), and with dots
            ``**{"stages.0.tokens": "2M"}``. Values are those of a recipe, such as ``"10M"`` and ``"5%"``, or numbers.
            ``imports="my_parts.py"`` stands for the key ``import``.

    Returns:
        Folders and figures.

    Raises:
        UserError: the recipe is wrong, or cannot work here. The message has every problem.
        GateFailed: a gate of an ``evaluate`` stage is not met; the report is written.
        NonFiniteError, MemoryFullError: training failed; the last checkpoint is kept, and the same call resumes there.
    """
    from ...configs.loader import load_recipe, recipe_from_dict
    from ...configs.recipe import Recipe, resolved

    given = pairs(overrides)
    if isinstance(recipe, Recipe):
        loaded = recipe_from_dict(resolved(recipe), given) if given else recipe
    elif isinstance(recipe, Mapping):
        loaded = recipe_from_dict(recipe, given)
    else:
        wanted = "a recipe file, the name of a shipped recipe, a dict or a Recipe"
        loaded = load_recipe(as_path(recipe, "recipe", wanted), given)
    return started(loaded, as_out(out), quiet=quiet)


def pairs(overrides: Mapping[str, Any]) -> "list[Override]":
    """Keyword arguments as overrides; a dict for a section of the recipe is merged into it, key by key."""
    from ...configs.reading import SECTIONS

    found: list[Override] = []
    for key, value in overrides.items():
        if key in SECTIONS and isinstance(value, Mapping):
            found += [(f"{key}.{inner}", _plain(one)) for inner, one in value.items()]
        else:
            # 'import' is a word of Python's own
            found.append(("import" if key == "imports" else key, _plain(value)))
    return found


def _plain(value: Any) -> Any:
    """A value as a recipe would hold it: paths as text."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def started(recipe: "Recipe", out: Path | None, *, quiet: bool) -> RunResult:
    """Run a recipe that was read, and return its result.

    Raises: as ``run``.
    """
    import yaml

    from ...configs.recipe import resolved
    from ..run.start import start

    where = out or Path("runs") / recipe.name
    with tempfile.TemporaryDirectory(prefix="decoct-") as folder:
        # further processes read the recipe from a file, as those of `decoct run` do
        file = Path(folder) / "recipe.yaml"
        plain = resolved(recipe, [str(Path(one.path).absolute()) for one in recipe.imports])
        file.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")
        try:
            start(recipe, where, arguments=["run", str(file), "--out", str(where)], quiet=quiet)
        except SystemExit as ended:
            raise _error_of(ended) from None
    return RunResult(folder=where, report=json.loads((where / "report.json").read_text(encoding="utf-8")))


def _error_of(ended: SystemExit) -> BaseException:
    """The error that stands for the exit code of further processes, whose messages are on stderr."""
    if ended.code == 130:
        return KeyboardInterrupt()
    kinds: dict[Any, type[DecoctError]] = {2: UserError, 3: GateFailed, 1: DecoctError}
    if (kind := kinds.get(ended.code)) is None:
        return ended
    return kind(f"the processes of the run ended with exit code {ended.code}; their messages are on stderr")
