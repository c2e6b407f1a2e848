"""A tokenizer's files are looked at before the library reads them, and what makes it panic is one message."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from decoct.launch.terminal.boundary import ending_of
from decoct.models.common.errors import UserError
from decoct.models.folder.loading import load_tokenizer
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer
from decoct.models.tokenizer.tokenizer_checks import check_tokenizer_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_tokenizer(["hello world " * 20], 280).save_pretrained(tmp_path)
    return tmp_path


def _added(number: int) -> Callable[[Any], Any]:
    token = {"content": "<far>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return lambda content: content["added_tokens"].append({"id": number, **token})


def _replace(times: int) -> Callable[[Any], Any]:
    parts = [{"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 400}] * times
    return lambda content: content.update(normalizer={"type": "Sequence", "normalizers": parts})


def _template(number: int) -> Callable[[Any], Any]:
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"E": {"id": "E", "ids": [number], "tokens": ["E"]}}
    processor = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "E", "type_id": 0}}, sequence], "pair": [sequence]}
    return lambda content: content.update(post_processor={**processor, "special_tokens": special})


def _split(pattern: str) -> Callable[[Any], Any]:
    return lambda content: content.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_added(10**9), "the token id 1000000000 is not below"),
        (lambda content: content["model"]["vocab"].update(far=2**31), "the token id 2147483648 is not below"),
        (lambda content: content["model"]["vocab"].update(far=-1), "cannot be loaded as a tokenizer"),
        (_replace(3), r"makes text up to 64,000,000 times as long"),
        (lambda content: content.update(normalizer={"type": "Prepend", "prepend": "x" * 10**6}), "puts 1,000,000 characters before"),
        (_template(999_999), "adds the token 999999, which the vocabulary does not have"),
        (lambda content: content["model"].update(continuing_subword_prefix="z" * 13), "the tokenizers library gave up"),
        (_split("(a|aa)+$|(.*)*(.*)*(.*)*x"), "the tokenizers library gave up"),
        (_split("("), "cannot be loaded as a tokenizer"),
        (lambda content: content.update(added_tokens=5, model=[]), "cannot be loaded as a tokenizer"),
    ],
)
def test_files_that_would_end_the_process_are_one_message(folder: Path, change: Callable[[Any], Any], message: str) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer_config.json", {"added_tokens_decoder": {"1000000000": {"content": "<far>"}}}), ("added_tokens.json", {"<far>": 10**9})],
)
def test_ids_beside_tokenizer_json_count_too(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{name}: the token id 1000000000 is not below"):
        check_tokenizer_files(folder)


def test_usual_normalizers_and_templates_are_taken(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    _template(0)(content)
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    check_tokenizer_files(folder)


def test_a_panic_in_the_middle_of_a_text_is_a_users_error(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a|aa)+$|(.*)*(.*)*(.*)*x"), "isolated")
    with pytest.raises(BaseException, match="retry-limit") as caught:
        tokenizer.encode("a" * 100 + "b")
    ending = ending_of(caught.value)
    assert ending is not None
    assert ending.code == 2
    assert "cannot split a text of the data" in ending.message
