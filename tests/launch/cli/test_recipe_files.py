"""A copied recipe is the user's: never overwritten, and checked in the editor by the schema that lies beside it."""

import json
from pathlib import Path

import pytest

from decoct.configs import load_recipe
from decoct.launch.cli.recipe_files import SCHEMA_NAME, copy_recipe, write_schema
from decoct.models.common.errors import UserError


def test_copy_never_overwrites(tmp_path: Path) -> None:
    target = copy_recipe("quickstart", tmp_path / "mine.yaml")
    assert "scratch" in target.read_text()
    target.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        copy_recipe("quickstart", target)
    assert target.read_text() == "mine"


@pytest.mark.parametrize("name", ["quickstart", "qwen3-8b-4b-int4"])
def test_a_copy_names_the_schema_beside_it(name: str, tmp_path: Path) -> None:
    target = copy_recipe(name, tmp_path / "mine.yaml")
    lines = target.read_text().splitlines()
    assert lines[0] == f"# yaml-language-server: $schema={SCHEMA_NAME}"
    assert not any("yaml-language-server" in line for line in lines[1:])
    assert load_recipe(target).stages == load_recipe(name).stages


def test_an_older_schema_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    file = write_schema(tmp_path / SCHEMA_NAME)
    whole = file.read_text()
    file.write_text(json.dumps({"title": "decoct recipe", "properties": {}}))
    assert write_schema(file).read_text() == whole
    for other in ("no json", '{"title": "another"}', "[1]"):
        file.write_text(other)
        with pytest.raises(
            UserError, match=r"exists and is not a schema of recipes; choose another name: decoct recipes schema --out FILE"
        ):
            write_schema(file)
        assert file.read_text() == other
    with pytest.raises(UserError, match=r"cannot be written \(.*\); choose another place"):
        write_schema(tmp_path / "nowhere" / SCHEMA_NAME)
