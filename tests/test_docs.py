"""docs/python-api.md is a program: its blocks run in order, as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_python_api_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python-api.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 6
    scope: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "docs/python-api.md", "exec"), scope)
    # the scratch teacher stays in the cache, which is here in a test
    assert [path.name for path in tmp_path.iterdir()] == ["decoct-cache"], "the page leaves nothing else behind"


def test_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link


def test_no_page_shows_a_path_of_somebodys_machine() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        assert not re.search(r"/(home|root|Users|work)/\w", page.read_text()), page
