"""Run folders of before there were blocks keep their held-out text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from decoct.configs import recipe_from_dict
from decoct.configs.recipe import Recipe, resolved
from decoct.launch.run.kept_split import kept_words, with_split
from decoct.trainer.data.split import WORDS

END = f"text of 1 document{WORDS['end']}"


def recipe(**data: Any) -> Recipe:
    plain = {"name": "x", "student": {"path": "s"}, "data": {"builtin": "python-stdlib", **data}}
    return recipe_from_dict({**plain, "stages": [{"pretrain": {"tokens": "1M"}}]})


def begun(folder: Path, by: Recipe, **changes: Any) -> Path:
    plain = resolved(by)
    plain["data"] |= changes
    plain["data"] = {key: value for key, value in plain["data"].items() if value != "absent"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plain))
    return folder


def test_a_new_run_holds_out_blocks(tmp_path: Path) -> None:
    assert with_split(recipe(), tmp_path).data.held_out == "blocks"
    assert kept_words(with_split(recipe(), tmp_path), recipe(), END) is None


def test_a_run_folder_without_a_rule_keeps_the_end_of_the_text_and_says_so(tmp_path: Path) -> None:
    folder = begun(tmp_path, recipe(), held_out="absent")
    kept = with_split(recipe(), folder)
    assert kept.data.held_out == "end"
    assert kept == replace(recipe(), data=replace(recipe().data, held_out="end"))
    assert "data.held_out=blocks" in (kept_words(kept, recipe(), END) or "")
    assert kept_words(kept, recipe(), "whole documents") is None
    begun(tmp_path, kept)
    assert with_split(recipe(), folder).data.held_out == "end", "and at the start after that"


def test_a_recipe_that_names_the_rule_gets_it(tmp_path: Path) -> None:
    folder = begun(tmp_path, recipe(), held_out="absent")
    assert with_split(recipe(held_out="blocks"), folder).data.held_out == "blocks"
    assert with_split(recipe(held_out="end"), tmp_path / "new").data.held_out == "end"


@pytest.mark.parametrize("written", [{"eval_tokens": 16384}, {"builtin": None, "files": ["a.txt"]}])
def test_other_text_is_split_anew(tmp_path: Path, written: dict[str, Any]) -> None:
    folder = begun(tmp_path, recipe(), held_out="absent", **written)
    assert with_split(recipe(), folder).data.held_out == "blocks"


@pytest.mark.parametrize("text", ["", "- a list", "data: 3", "{", "a: \x00"])
def test_a_recipe_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert with_split(recipe(), tmp_path).data.held_out == "blocks"


def test_conversations_are_split_as_ever(tmp_path: Path) -> None:
    asked = recipe(builtin=None, files=["a.jsonl"], kind="chat")
    kept = with_split(asked, tmp_path)
    assert kept.data.held_out == "end"
    assert kept_words(kept, asked, END) is None
