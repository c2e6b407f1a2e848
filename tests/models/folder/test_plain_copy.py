"""Plain text models out of what people have: the same logits, and a folder that every other verb takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from decoct.models.common.errors import UserError
from decoct.models.folder.loading import load_config, load_model, meta_model
from decoct.models.folder.plain_copy import make_plain
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL: dict[str, Any] = {**TEXT, "vocab_size": 260, "max_position_embeddings": 64, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["one two three", "two three four"], 260)


def _saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _gemma3() -> Any:
    text = {"model_type": "gemma3_text", **SMALL, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
    vision = {"model_type": "siglip_vision_model", **VISION}
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5)


def _llava(tied: bool = False) -> Any:
    vision = {"model_type": "clip_vision_model", "projection_dim": 32, **VISION}
    text = {"model_type": "llama", **SMALL, "tie_word_embeddings": tied}
    return transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5, tie_word_embeddings=tied)


def _mistral3() -> Any:
    vision = {"model_type": "pixtral", **{**VISION, "head_dim": 16}}
    return transformers.Mistral3Config(
        text_config={"model_type": "mistral", **SMALL, "head_dim": 8}, vision_config=vision, image_token_index=5
    )


@pytest.mark.parametrize("make", [_gemma3, _llava, lambda: _llava(tied=True), _mistral3], ids=["gemma3", "llava", "llava tied", "mistral3"])
def test_the_text_model_of_a_larger_one_has_its_logits(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = _saved(AutoModelForMultimodalLM.from_config(make()), tokenizer, tmp_path / "whole")
    whole = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with pytest.raises(UserError, match=rf"it has vision beside it.*decoct plain {folder} --out"):
        load_model(folder, dtype=torch.float32)
    with pytest.raises(UserError, match="decoct plain"):
        meta_model(load_config(folder))
    make_plain(str(folder), tmp_path / "text")
    text = load_model(tmp_path / "text", dtype=torch.bfloat16)
    assert text.config.get_text_config() is text.config
    ids = torch.arange(40)[None] + 50
    with torch.no_grad():
        assert torch.equal(whole(input_ids=ids).logits, text(input_ids=ids).logits)
    assert json.loads((tmp_path / "text/decoct.json").read_text())["plain"] == f"text model of a {whole.config.model_type}"
    with pytest.raises(UserError, match="is a plain text model already"):
        make_plain(str(tmp_path / "text"), tmp_path / "again")


def test_a_model_whose_text_part_transformers_does_not_have_alone_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = transformers.Qwen2VLConfig(text_config={**SMALL, "rope_parameters": rope}, vision_config=vision)
    folder = _saved(AutoModelForMultimodalLM.from_config(config), tokenizer, tmp_path / "whole")
    with pytest.raises(UserError, match="transformers has no text-only form of it; use a text model"):
        load_model(folder, dtype=torch.float32)
    with pytest.raises(UserError, match="no text-only form"):
        make_plain(str(folder), tmp_path / "text")
    assert not (tmp_path / "text").exists()


def _llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()


def test_an_adapter_is_merged(tokenizer: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = _saved(_llama(), tokenizer, tmp_path / "base")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    folder = tmp_path / "adapter"
    adapted.save_pretrained(str(folder))
    with pytest.raises(UserError, match=rf"holds an adapter of {base} .*merge it .*: decoct import {folder} --out MODEL"):
        load_model(folder, dtype=torch.float32)
    make_plain(str(folder), tmp_path / "merged")
    merged = load_model(tmp_path / "merged", dtype=torch.bfloat16)
    expected = load_file(base / "model.safetensors")
    parts = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in expected if "q_proj" in name]:
        down, up = (parts[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"] for part in "AB")
        added = up.float() @ down.float() * (8 / 2)
        assert added.abs().max() > 0.1
        expected[name] = (expected[name].float() + added).to(torch.bfloat16)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_fp8_weights_are_unpacked(tokenizer: Any, tmp_path: Path) -> None:
    folder = _saved(_llama(), tokenizer, tmp_path / "fp8")
    weights = load_file(folder / "model.safetensors")
    expected = {}
    for name in [name for name in weights if "proj" in name]:
        scale = torch.rand(1, 1) + 0.5
        codes = (weights[name].float() / scale).to(torch.float8_e4m3fn)
        weights[name], weights[f"{name}_scale_inv"] = codes, scale
        expected[name] = (codes.float() * scale).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=rf"\(quantization_config in config.json: fp8\).*unpack them to 16 bits first: decoct plain {folder}"
    ):
        load_model(folder, dtype=torch.float32)
    make_plain(str(folder), tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    stored = load_model(tmp_path / "plain", dtype=torch.bfloat16).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor), name


def test_weights_of_bitsandbytes_are_unpacked(tokenizer: Any, tmp_path: Path) -> None:
    from bitsandbytes import functional

    base = _saved(_llama(), tokenizer, tmp_path / "base")
    packed = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
        device_map="cpu",
    )
    folder = tmp_path / "packed"
    packed.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"decoct plain .*teacher.load_in: nf4"):
        load_model(folder, dtype=torch.float32)
    make_plain(str(folder), tmp_path / "plain")
    stored = load_model(tmp_path / "plain", dtype=torch.bfloat16).state_dict()
    for name, weight in load_file(base / "model.safetensors").items():
        if "proj" in name:
            weight = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="fp4"))
        assert torch.equal(stored[name], weight), name


def test_weights_of_other_kinds_name_the_model_before(tokenizer: Any, tmp_path: Path) -> None:
    folder = _saved(_llama(), tokenizer, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(UserError, match=r"config.json: gptq\).*or the unquantized model that it was made from"):
        load_model(folder, dtype=torch.float32)
    with pytest.raises(UserError, match=r"packed weights \(gptq\), which are not unpacked here"):
        make_plain(str(folder), tmp_path / "plain")
