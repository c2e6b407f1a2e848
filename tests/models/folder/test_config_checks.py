"""Absurd numbers in config.json are refused at once, by whoever opens the folder, before anything is built of them."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.models.common.errors import UserError
from decoct.models.folder.config_checks import check_numbers
from decoct.models.folder.loading import load_config, load_model
from decoct.models.folder.streaming import empty_model
from decoct.models.student import student_from_config
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

ABSURD: list[tuple[str, Any]] = [
    ("num_hidden_layers", 10_000_000),
    ("num_hidden_layers", 2**64),
    ("num_hidden_layers", 10**30),
    ("num_hidden_layers", 2048),
    ("num_hidden_layers", 900),
    ("num_hidden_layers", True),
    ("num_hidden_layers", -5),
    ("hidden_size", 2**40),
    ("hidden_size", float("inf")),
    ("hidden_size", float("nan")),
    ("hidden_size", 64.5),
    ("vocab_size", 2**31),
    ("vocab_size", 2**24),
    ("num_attention_heads", 2**33),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 10**9),
    ("intermediate_size", 10**12),
    ("intermediate_size", 10**7),
    ("num_experts", 10**7),
    ("head_dim", 2**30),
    ("head_dim", 0),
    ("max_position_embeddings", 2**62),
    ("text_config", {"num_hidden_layers": 10**8}),
]


@pytest.fixture
def folder(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("name", "value"), ABSURD, ids=str)
def test_no_folder_is_loaded_with_it_and_nothing_takes_long(folder: Path, name: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    for door in (lambda: load_model(folder, dtype=torch.float32), lambda: empty_model(folder)):
        started = time.process_time()
        with pytest.raises(UserError):
            door()
        assert time.process_time() - started < 3


def test_the_message_names_field_and_file(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 900}))
    with pytest.raises(UserError, match=r"config\.json: num_hidden_layers is 900, but the weight files hold \d+ tensors"):
        load_model(folder, dtype=torch.float32)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10_000_000}))
    with pytest.raises(UserError, match=r"config\.json: num_hidden_layers is 10000000; a whole number up to 1,000 is allowed"):
        load_config(folder)
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 2**24}))
    with pytest.raises(UserError, match=r"asks for 1,073,772,832 of them; the files hold"):
        load_model(folder, dtype=torch.float32)


def test_a_recipe_cannot_ask_for_it_either() -> None:
    tokenizer = train_tokenizer(["hello world"], 257)
    with pytest.raises(UserError, match=r"student\.config: num_hidden_layers is 10000000"):
        student_from_config({"model_type": "llama", "num_hidden_layers": 10_000_000}, tokenizer, 0)


@pytest.mark.parametrize("value", [4096.5, float("nan"), float("inf"), [4096, 0.5]])
def test_a_size_is_a_whole_number(value: Any) -> None:
    with pytest.raises(UserError, match=r"config\.json: intermediate_size is .*; a whole number up to 16,777,216 is allowed"):
        check_numbers({"intermediate_size": value}, "config.json")


def test_what_published_models_have_is_taken() -> None:
    for fields in (
        {"num_hidden_layers": 126, "hidden_size": 16384, "vocab_size": 262_208, "max_position_embeddings": 10_485_760},
        {"num_hidden_layers": 61, "n_routed_experts": 384, "num_experts_per_tok": 8},
        {"intermediate_size": [16384] * 35, "num_key_value_heads": None, "num_experts": 0, "sliding_window": None},
        {"n_inner": None, "n_layer": 48, "n_embd": 1600, "head_dim": -1},
        {"sliding_window": 4096.0},
    ):
        check_numbers(fields, "config.json")
