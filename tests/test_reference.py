"""The reference pages and the JSON Schema are what the code makes of them: none is written by hand, none is left behind."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from decoct import types_of
from decoct.configs.reading import KEYS, SECTIONS
from decoct.trainer.stages.registry import STAGE_KINDS

ROOT = Path(__file__).resolve().parent.parent


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_pages", ROOT / "docs" / "reference_pages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES: dict[Path, str] = _generator().pages()


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_a_generated_file_is_up_to_date(file: Path) -> None:
    assert file.read_text(encoding="utf-8") == PAGES[file], "run `make reference` and commit what it writes"


def test_every_key_of_a_recipe_has_a_row() -> None:
    rows = set(re.findall(r"^\| \[?`([a-z0-9_]+)`", PAGES[ROOT / "docs" / "reference" / "recipe.md"], flags=re.MULTILINE))
    expected = set(KEYS)
    for settings in (*SECTIONS.values(), *(stage.settings for stage in STAGE_KINDS.values())):
        expected |= set(types_of(settings))
    assert expected <= rows, sorted(expected - rows)


def test_every_link_of_a_page_has_its_heading() -> None:
    for file, text in PAGES.items():
        if file.suffix != ".md":
            continue
        headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
        anchors = ["".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_") for heading in headings]
        assert len(anchors) == len(set(anchors)), "two headings with one anchor"
        links = re.findall(r"\]\(#([^)]*)\)", text)
        assert links
        assert set(links) <= set(anchors)
