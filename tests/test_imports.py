"""Who may import whom: one direction between the top folders, no circle inside any folder, an oracle that stands alone.

An import counts wherever it stands: at the top of a file, inside a function, or under ``TYPE_CHECKING``.
"""

import ast
import importlib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW = {
    "losses": set[str](),
    "models": set[str](),
    "qat": {"models"},
    "trainer": {"losses", "models", "qat"},
    "configs": {"losses", "models", "qat", "trainer"},
    "launch": {"losses", "models", "qat", "trainer", "configs"},
}
"""Top folder -> the top folders that it may import."""
SHARED = ("parts",)
"""Modules beside the top folders, which import nothing else of decoct when they are imported: whoever needs them may import them."""
NO_LIGHTNING = ("losses", "models", "qat", "configs")


class Import(NamedTuple):
    """One import of a module of ours, both as dotted names below ``decoct``."""

    source: str
    target: str
    place: str
    """File and line."""


@cache
def modules() -> dict[str, Path]:
    """Every module by its dotted name below ``decoct``; a package's is that of its folder and ``__init__``."""
    found: dict[str, Path] = {}
    for top in BELOW:
        for file in sorted((ROOT / top).rglob("*.py")):
            found[".".join(file.relative_to(ROOT).with_suffix("").parts)] = file
    return found


def in_file(source: str, file: Path) -> Iterator[Import]:
    """Imports of ours in one file."""
    package = source.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        place = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("decoct."), f"{place}: import our own modules relatively"
        if not isinstance(node, ast.ImportFrom):
            continue
        assert node.level or not (node.module or "").startswith("decoct."), f"{place}: import our own modules relatively"
        if not node.level:
            continue
        base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        base = [part for part in base if part]
        for alias in node.names:
            for target in (".".join([*base, alias.name]), ".".join([*base, alias.name, "__init__"]), ".".join(base)):
                if target in modules():
                    yield Import(source, target, place)
                    break
            else:
                # `from .. import lazy_names` of the root package has none
                if base and base[0] not in SHARED:
                    yield Import(source, ".".join([*base, "__init__"]), place)


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for source, file in modules().items() for found in in_file(source, file))


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Nodes that reach each other, by the nodes that each can reach."""
    reach: dict[str, set[str]] = {}
    for start in arrows:
        seen: set[str] = set()
        todo = list(arrows[start])
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += arrows.get(node, ())
        reach[start] = seen
    return sorted(
        {tuple(sorted(other for other in seen if start in reach.get(other, ()))) for start, seen in reach.items() if start in seen}
    )  # type: ignore[arg-type, return-value]


def inside(folder: str, found: tuple[Import, ...]) -> dict[str, dict[str, list[str]]]:
    """Children of a folder -> the children that they import -> the places."""
    arrows: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    prefix = f"{folder}." if folder else ""
    for source, target, place in found:
        if source.startswith(prefix) and target.startswith(prefix):
            one, other = source[len(prefix) :].split(".")[0], target[len(prefix) :].split(".")[0]
            if one != other:
                arrows[one][other].append(place)
    return arrows


def folders() -> list[str]:
    return sorted({".".join(name.split(".")[:-1]) for name in modules()})


@pytest.mark.parametrize("folder", folders())
def test_no_circle_inside_a_folder(folder: str) -> None:
    arrows = inside(folder, imports())
    found = circles({one: set(others) for one, others in arrows.items()})
    places = [place for circle in found for one in circle for other in circle for place in arrows[one].get(other, ())]
    assert not found, f"{found}: {places}"


@pytest.mark.parametrize("top", BELOW)
def test_top_folders_import_in_one_direction(top: str) -> None:
    wrong = [found for found in imports() if found.source.split(".")[0] == top and found.target.split(".")[0] not in {top, *BELOW[top]}]
    assert not wrong, wrong


@pytest.mark.parametrize("top", NO_LIGHTNING)
def test_lightning_is_the_trainers_alone(top: str) -> None:
    for name, file in modules().items():
        if name.split(".")[0] == top:
            for node in ast.walk(ast.parse(file.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert not any(found.split(".")[0] == "lightning" for found in names), f"{file}:{getattr(node, 'lineno', 0)}"


def test_the_readers_import_no_other_part_of_qat() -> None:
    """They are the oracle of every export: what they share with the writers they cannot find wrong."""
    wrong = [
        f
        for f in imports()
        if f.source.startswith("qat.readers.") and f.target.startswith("qat.") and not f.target.startswith("qat.readers.")
    ]
    assert not wrong, wrong


def test_a_circle_is_found() -> None:
    found = (Import("a.x", "a.y", "x:1"), Import("a.y", "a.z", "y:1"), Import("a.z", "a.x", "z:1"), Import("a.w", "a.x", "w:1"))
    assert circles({one: set(others) for one, others in inside("a", found).items()}) == [("x", "y", "z")]


def faces() -> list[str]:
    return [name.removesuffix(".__init__") for name, file in modules().items() if "lazy_names(__name__)" in file.read_text()]


@pytest.mark.parametrize("package", faces())
def test_a_package_hands_on_what_it_lists(package: str) -> None:
    module = importlib.import_module(f"decoct.{package}")
    listed = [node for block in ast.parse(Path(str(module.__file__)).read_text()).body if isinstance(block, ast.If) for node in block.body]
    names = [alias.name for node in listed if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert names
    for name in names:
        # a module of the same name would take the place of what is handed on
        assert not isinstance(getattr(module, name), ModuleType), name
        assert name in dir(module)
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_this_name'"):
        getattr(module, "nothing_of_this_name")  # noqa: B009 (a bare attribute is a useless expression)


def test_every_package_says_what_it_is() -> None:
    for name, file in modules().items():
        if name.endswith("__init__"):
            assert ast.get_docstring(ast.parse(file.read_text())), name
