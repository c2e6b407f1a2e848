"""The documentation is true where that can be checked: links, navigation, the files, tests and messages that pages name, and their code."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from decoct.configs import recipe_from_dict

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TOP = ("trainer", "models", "losses", "qat", "launch", "configs")
PAGES = sorted(DOCS.rglob("*.md"))
AT_THE_TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (ROOT / name).exists()]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
NAMED_FILE = re.compile(r"`([\w./-]+/[\w.-]+\.(?:py|yaml|yml|toml|json|md|svg))`")
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """What `#...` may point to: the headings of a page, as Markdown renderers name them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[str, str]]:
    """(target, anchor) of every link and picture to something of ours."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


@pytest.mark.parametrize("page", [*PAGES, *AT_THE_TOP], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{path}: no such file"
        # what lies outside docs/ is not on the site
        assert page in AT_THE_TOP or target.is_relative_to(DOCS), f"{path} leaves docs/; name the file instead"
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}: no such heading; there are {sorted(anchors(target))}"


def nav_pages(entry: object) -> Iterator[str]:
    """Every page that a part of mkdocs.yml's navigation lists."""
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from nav_pages(inner)


def test_the_navigation_lists_every_page_once() -> None:
    listed = list(nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert len(listed) == len(set(listed))
    assert set(listed) == {str(page.relative_to(DOCS)) for page in PAGES}


@pytest.mark.parametrize("page", [DOCS / "architecture.md", *(page for page in AT_THE_TOP if page.name != "CHANGELOG.md")], ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = NAMED_FILE.findall(page.read_text())
    missing = [path for path in named if not (ROOT / path).exists() and not path.startswith(("runs/", "quant/"))]
    assert not missing, missing


def test_laws_name_tests_that_exist() -> None:
    text = (DOCS / "architecture.md").read_text()
    laws = re.split(r"^### Law (\d)", text.partition("## Who may import whom")[0], flags=re.MULTILINE)[1:]
    assert laws[::2] == ["1", "2", "3", "4", "5", "6"]
    for number, law in zip(laws[::2], laws[1::2], strict=True):
        named = NAMED_TEST.findall(law)
        assert named, f"law {number} names no test"
        for file, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file} has no {test}"


def test_whoever_cites_a_law_says_where_it_stands() -> None:
    for top in TOP:
        for file in (ROOT / top).rglob("*.py"):
            text = file.read_text()
            assert not re.search(r"\blaw [1-6]\b(?!, docs/architecture\.md)", text, re.IGNORECASE), f"{file}: (law N, docs/architecture.md)"


def folders() -> set[str]:
    """Every folder of source, as 'launch/' or 'launch/cli'."""
    inner = {str(f.relative_to(ROOT)) for top in TOP for f in (ROOT / top).rglob("*") if f.is_dir() and f.name != "__pycache__"}
    return inner | {f"{top}/" for top in TOP}


def test_the_architecture_page_names_every_folder() -> None:
    rows = re.findall(r"^\| `([\w/]+)` \|", (DOCS / "architecture.md").read_text().partition("## The path")[0], re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == folders()


def test_the_picture_shows_every_folder() -> None:
    shown = set(re.findall(r">([\w/]+)</text>", (DOCS / "architecture-folders.svg").read_text()))
    second = {folder.partition("/")[2] for folder in folders() if folder.count("/") == 1 and not folder.endswith("/")}
    missing = {*second, *(f"{top}/" for top in TOP)} - shown
    assert not missing, f"{missing}: add them to docs/architecture_picture.py and draw the picture again"


def messages() -> Iterator[str]:
    """Every text in the source, its parts joined, values as a space."""
    for top in TOP:
        for file in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node] if isinstance(node, ast.Constant) else []
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else " " for part in parts)
                if text:
                    yield text


def test_troubleshooting_quotes_messages_that_exist() -> None:
    source = "\n".join(messages())
    quoted = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) >= 25
    missing = [part for message in quoted for part in message.split(" ... ") if part.replace("...", " ").strip() not in source]
    assert not missing, missing


def recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    """(page, recipe) of every block of YAML: a whole recipe, a section of one, or a list of stages."""
    for page in [*PAGES, ROOT / "README.md"]:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
            lines = [line for line in block.splitlines() if line.strip()]
            same = len(lines) > 1 and all(line.split(":")[0] == lines[0].split(":")[0] for line in lines)
            for text in lines if same else [block]:
                given = yaml.safe_load(text)
                yield name_of(page), given if isinstance(given, dict) else {"stages": given}


@pytest.mark.parametrize(("page", "given"), recipes(), ids=lambda value: value if isinstance(value, str) else "")
def test_recipes_on_a_page_are_valid(page: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # where the files are that a recipe imports
    monkeypatch.chdir(ROOT)
    whole = {"name": "page", "teacher": {"path": "big"}, "student": {"path": "small"}, "data": {"files": ["corpus/*.jsonl"]}}
    recipe_from_dict({**whole, "stages": [{"distill": {"tokens": "10M"}}], **given})


def python_blocks() -> list[tuple[str, str]]:
    """(page, code) of every Python block outside python-api.md, which tests/test_docs.py runs as one program."""
    pages = [page for page in PAGES if page.name not in ("python-api.md", "serving.md")]
    return [(name_of(page), block) for page in pages for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]


@pytest.mark.parametrize(("page", "code"), python_blocks(), ids=lambda value: value if value.endswith(".md") else "")
def test_python_of_a_page_runs(page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {"__name__": "page"})


def test_the_workflow_runs_what_ci_runs_on_every_python_that_is_promised() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]["test"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    assert workflow["strategy"]["matrix"]["python"] == re.findall(r"Python :: (3\.\d+)", "\n".join(classifiers))
    commands = re.findall(r"^make .+$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert commands
    assert [step["run"] for step in workflow["steps"] if "run" in step] == commands


def test_hooks_and_forms_name_what_exists() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for word in " ".join(hook["entry"] for hook in hooks).split():
        assert not word.startswith("tests/") or (ROOT / word).is_file(), word
    for form in ("bug", "feature"):
        body = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text())["body"]
        assert len({part["id"] for part in body}) == len(body)
        assert all((ROOT / path).is_file() for part in body for path in re.findall(r"docs/\w+\.md", str(part)))
