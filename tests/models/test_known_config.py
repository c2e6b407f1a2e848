"""A config that is read without transformers has the attributes of transformers' own; what is unusual is left to transformers."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import decoct.models.known_config as known_config_module
from decoct.configs.architectures import architecture, names
from decoct.models.folder.loading import load_config
from decoct.models.known_config import KnownConfig, known_config

SIZES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
}  # fmt: skip
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# transformers turns these into objects of torch, or makes them of other fields
NOT_READ = {"dtype", "id2label", "label2id", "problem_type"}


def check_same(found: KnownConfig | None, real: Any) -> None:
    """Every attribute of transformers' config is there with its value, and no other."""
    assert isinstance(found, KnownConfig)
    assert found.model_type == real.model_type
    own = {name: value for name, value in vars(real).items() if not name.startswith("_")}
    assert {name for name in own if name not in NOT_READ} <= vars(found).keys()
    for name, value in vars(found).items():
        if name != "name_or_path":
            expected = getattr(real, name)
            assert (value, type(value)) == (expected, type(expected)), name
    assert found.get_text_config() is found


def without_defaults(kind: str) -> dict[str, Any]:
    """Fields that every family accepts; a default of a token may lie beyond a small vocabulary."""
    return {"model_type": kind, **SIZES}


@pytest.mark.parametrize("name", names())
def test_stored_architectures(name: str) -> None:
    check_same(known_config(architecture(name)), AutoConfig.for_model(**architecture(name)))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_value_heads": 2},
        {"head_dim": 20},
        {"tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.0", "architectures": ["X"]},
        {"rope_theta": 500000.0, "rope_scaling": None},
        {"rope_scaling": LLAMA3, "rope_theta": 5e5, "max_position_embeddings": 1024},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "max_position_embeddings": 1024},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        {"is_llama_config": True, "rope_interleaved": False, "an_unknown_field": 1.5},
        {"eos_token_id": [1, 2], "pad_token_id": 3},
    ],
    ids=str,
)
def test_every_kind_of_field(kind: str, options: dict[str, Any]) -> None:
    fields = {**without_defaults(kind), **options}
    given = copy.deepcopy(fields)
    found = known_config(fields)
    assert fields == given
    check_same(found, AutoConfig.for_model(**fields))


def test_layer_types_that_are_given() -> None:
    fields = {**without_defaults("qwen3"), "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    check_same(known_config(fields), AutoConfig.for_model(**fields))


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "gemma2"},
        {"model_type": None},
        {"hidden_size": 50},  # no multiple of the heads: Llama refuses it
        {"hidden_size": 48.0},
        {"hidden_act": "gelu"},
        {"dtype": "float8"},
        {"pad_token_id": 97},
        {"initializer_range": 2.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {**LLAMA3, "factor": 0.5}, "max_position_embeddings": 1024},
        {"rope_scaling": LLAMA3, "max_position_embeddings": 256},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_theta": None},
        {"head_dim": 21},
        {"num_labels": 3},
        {"temperature": 0.5},
        {"quantization_config": {"quant_method": "gptq"}},
        {"text_config": 1},
        {"partial_rotary_factor": 0.5},
        {"is_encoder_decoder": True},
        {"_commit_hash": "x"},
        {"layer_types": ["full_attention"] * 3},  # no field of Llama
        {"auto_map": {"AutoConfig": "code.Config"}},
        {"vocab_size": True},
    ],
    ids=str,
)
def test_what_is_unusual_is_left_to_transformers(options: dict[str, Any]) -> None:
    assert known_config(without_defaults("llama")) is not None
    assert known_config({**without_defaults("llama"), **options}) is None


def test_another_release_of_transformers_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_config_module, "transformers_version", lambda: "5.99.0")
    assert known_config(without_defaults("llama")) is None


@pytest.mark.parametrize("seed", range(40))
def test_random_fields(seed: int) -> None:
    draw = random.Random(seed)
    kind = draw.choice(FAMILIES)
    heads = draw.choice([1, 2, 4])
    fields: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": heads * draw.choice([8, 16]),
        "intermediate_size": draw.randint(1, 100),
        "num_hidden_layers": draw.randint(1, 6),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([1, heads]),
        "max_position_embeddings": draw.choice([128, 4096]),
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
        "tie_word_embeddings": draw.random() < 0.5,
    }
    extra = {
        "head_dim": 16, "attention_bias": True, "mlp_bias": True, "use_cache": False, "attention_dropout": 0.1, "sliding_window": 64,
        "use_sliding_window": True, "max_window_layers": 2, "rope_theta": 1e6, "pretraining_tp": 1, "initializer_range": 0.01,
    }  # fmt: skip
    fields |= {name: value for name, value in extra.items() if draw.random() < 0.4}
    check_same(known_config(fields), AutoConfig.for_model(**fields))


def test_a_folder_is_read_alike(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**without_defaults("qwen2"), "torch_dtype": "float16"}))
    light, real = load_config(tmp_path, light=True), load_config(tmp_path)
    check_same(light, real)  # pyright: ignore[reportArgumentType]
    assert light.name_or_path == real.name_or_path
    (tmp_path / "config.json").write_text(json.dumps({**without_defaults("qwen2"), "num_labels": 3}))
    assert type(load_config(tmp_path, light=True)) is type(real)


def test_copies_are_independent() -> None:
    config: Any = known_config(without_defaults("qwen3"))
    other = copy.deepcopy(config)
    other.layer_types.append("full_attention")
    other.hidden_size = 8
    assert (len(config.layer_types), config.hidden_size) == (3, 48)
    assert not hasattr(config, "no_such_field")
