"""What transformers 4 reads of the folders that are written, and that transformers 5 still reads the same."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, LlamaConfig, LlamaForCausalLM

from decoct.models.folder import older_readers
from decoct.models.folder.loading import load_config, load_tokenizer
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.folder.older_readers import mend_tokenizer_config, older_fields, with_older_fields
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer


@pytest.fixture
def tokenizer() -> Any:
    return train_tokenizer(["one two three", "two three four"], 260)


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip


def _written(kind: str, **fields: Any) -> dict[str, Any]:
    return json.loads(AutoConfig.for_model(kind, **fields).to_json_string(use_diff=False))


def _without_type(rope: dict[str, Any]) -> dict[str, Any]:
    """``type`` is the older word for ``rope_type``, which stands beside it."""
    return {key: value for key, value in rope.items() if key != "type"}


def test_a_saved_folder_says_its_frequencies_in_both_ways(tmp_path: Path, tokenizer: Any) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        rope_parameters={"rope_theta": 5e5, **LLAMA3},
    )  # fmt: skip
    folder = save_model_folder(tmp_path / "model", LlamaForCausalLM(config), tokenizer, {}, dtype=None)
    written = json.loads((folder / "config.json").read_text())
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"] == {**LLAMA3, "type": "llama3"}
    assert (written["dtype"], written["torch_dtype"]) == ("float32", "float32")
    assert _without_type(load_config(folder).rope_parameters) == config.rope_parameters
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert load_tokenizer(folder)("one two")["input_ids"] == tokenizer("one two")["input_ids"]


def test_plain_frequencies_have_no_scaling() -> None:
    assert older_fields(_written("llama", rope_parameters={"rope_type": "default", "rope_theta": 7.0})) == {
        "rope_theta": 7.0,
        "rope_scaling": None,
    }


def test_the_words_of_each_family() -> None:
    gemma = older_fields(_written("gemma3_text"))
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"], gemma["rope_scaling"]) == (1e6, 1e4, None)
    linear = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    layers = {"full_attention": linear, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    scaled = with_older_fields(_written("gemma3_text", rope_parameters=layers))
    assert (scaled["rope_theta"], scaled["rope_local_base_freq"]) == (1e6, 1e4), "as the published 4B has them"
    assert scaled["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 8.0}
    neox = older_fields(_written("gpt_neox", rope_parameters={"rope_theta": 5.0, "partial_rotary_factor": 0.5, "rope_type": "default"}))
    assert (neox["rotary_emb_base"], neox["rotary_pct"]) == (5.0, 0.5)
    assert older_fields(_written("stablelm"))["partial_rotary_factor"] == 0.25
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    long = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096, **factors}
    assert older_fields({"model_type": "phi3", "rope_parameters": long})["rope_scaling"] == {"type": "longrope", **factors}
    modern = older_fields(_written("modernbert-decoder"))
    assert modern["global_rope_theta"] == 160000.0
    assert older_fields(_written("gpt2")) == {}


def test_this_transformers_reads_the_same_numbers_of_every_family(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    seen = 0
    for kind in CONFIG_MAPPING:
        build = CONFIG_MAPPING[kind]
        if build not in MODEL_FOR_CAUSAL_LM_MAPPING or kind == "gemma4_assistant":  # its own defaults are refused
            continue
        config: Any = build()
        rope = config.to_dict().get("rope_parameters")
        if not rope:
            continue
        written = json.loads(config.to_json_string(use_diff=False))
        file.write_text(json.dumps(with_older_fields(written)))
        read = build.from_json_file(file).to_dict()["rope_parameters"]
        assert _without_type(read) == _without_type(rope), kind
        seen += older_fields(written) != {}
    assert seen > 90


def test_fields_that_this_transformers_would_read_otherwise_are_left_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a field that says something else than rope_parameters: transformers 5 believes rope_scaling
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    monkeypatch.setattr(older_readers, "older_fields", lambda config: {"rope_theta": 1e4, "rope_scaling": {**rope, "factor": 3.0}})
    with caplog.at_level(logging.WARNING):
        written = with_older_fields({"model_type": "qwen2", "rope_parameters": rope})
    assert "rope_theta" not in written
    assert "rope_scaling" not in written
    assert "no rope_theta beside rope_parameters for model type qwen2" in caplog.text


def test_older_fields_that_are_not_true_any_more_are_replaced() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    written = with_older_fields(
        {"model_type": "qwen2", "rope_parameters": rope, "rope_theta": 3.0, "rope_scaling": {"type": "linear", "factor": 9.0}}
    )
    assert (written["rope_theta"], written["rope_scaling"]) == (1e4, None)


def test_tokenizer_configs_of_version_5_get_a_class_and_tokens_that_version_4_knows(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|call|>"]})
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    assert json.loads(file.read_text())["tokenizer_class"] == "TokenizersBackend"
    mend_tokenizer_config(file)
    mended = json.loads(file.read_text())
    assert (mended["tokenizer_class"], mended["additional_special_tokens"]) == ("PreTrainedTokenizerFast", ["<|call|>"])
    assert "extra_special_tokens" not in mended
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again("a<|call|>b", add_special_tokens=False) == tokenizer("a<|call|>b", add_special_tokens=False)
    before = file.read_bytes()
    mend_tokenizer_config(file)
    assert file.read_bytes() == before
    mend_tokenizer_config(tmp_path / "absent.json")
