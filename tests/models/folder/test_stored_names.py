"""Names of tensors in files and in modules, as transformers' own conversion has them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.models.folder.stored_names import ignored, module_names, not_loaded, stored_names, stored_tensors, summary
from decoct.models.folder.streaming import can_stream, streamed_model

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32, "num_experts": 2,
    "num_experts_per_tok": 1, "num_local_experts": 2, "layer_types": None,
}  # fmt: skip


def _model(kind: str) -> Any:
    known = set(AutoConfig.for_model(kind).to_dict())
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{name: value for name, value in SIZES.items() if name in known and value is not None})
    return AutoModelForCausalLM.from_config(config).eval()


KINDS = ["llama", "gpt_neox", "gpt2", "opt", "mixtral", "qwen3_moe", "granitemoe", "flint"]


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_those_of_the_file_that_transformers_writes(kind: str, tmp_path: Path) -> None:
    model = _model(kind)
    model.save_pretrained(tmp_path)
    written, own = load_file(tmp_path / "model.safetensors"), model.state_dict()
    stored, names = stored_tensors(model), stored_names(model)
    assert written.keys() <= stored.keys()
    assert {name: tuple(written[name].shape) for name in written} == {name: tuple(stored[name].shape) for name in written}
    for name, file_name in names.items():
        if file_name in written:
            assert torch.equal(own[name], written[file_name]), name
    back = module_names(model, written)
    assert all(back[file_name] == name for name, file_name in names.items() if file_name in written)
    joined = {name for name, inside in back.items() if inside is None}
    assert bool(joined) == (kind in ("mixtral", "qwen3_moe")), joined
    assert not_loaded(model, written) == []


def test_what_a_family_renames() -> None:
    assert stored_names(_model("gpt_neox"))["lm_head.weight"] == "embed_out.weight"
    assert module_names(_model("gpt_neox"), ["embed_out.weight", "lm_head.weight"]) == {
        "embed_out.weight": "lm_head.weight",
        "lm_head.weight": "lm_head.weight",
    }
    assert module_names(_model("gpt2"), ["wte.weight"]) == {"wte.weight": "transformer.wte.weight"}, "saved without its head"


def test_renamed_weights_are_streamed(tmp_path: Path) -> None:
    model = _model("gpt_neox")
    model.save_pretrained(tmp_path)
    assert "embed_out.weight" in load_file(tmp_path / "model.safetensors")
    assert can_stream(tmp_path)
    streamed = streamed_model(tmp_path, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(streamed.state_dict()[name], tensor), name
    _model("mixtral").save_pretrained(tmp_path / "experts")
    assert not can_stream(tmp_path / "experts")


def test_further_heads_are_not_loaded_and_constants_do_not_count() -> None:
    model = _model("qwen3_next")
    heads = ["mtp.fc.weight", "mtp.layers.0.mlp.gate.weight", "mtp.layers.0.norm.weight"]
    files = [*stored_tensors(model), *heads, "model.rotary_emb.inv_freq"]
    found = not_loaded(model, files)
    assert found == heads
    assert ignored(model, files) == [*found, "model.rotary_emb.inv_freq"]
    assert summary(found) == {"mtp.*": 1, "mtp.layers.0.*": 2}
    assert summary(["model.layers.61.mlp.experts.3.up_proj.weight", "model.visual.proj.bias"]) == {"model.layers.61.*": 1, "model.*": 1}
    neox = _model("gpt_neox")
    old = [*stored_tensors(neox), "gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias"]
    assert not_loaded(neox, old) == []
    assert not_loaded(neox, [*old, "strange.weight"]) == [], "unexpected ones are refused when the model is loaded"
