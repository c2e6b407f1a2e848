"""Exports of families whose files call tensors otherwise than their modules, and of folders with more than transformers loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import read_record, save_model_folder
from decoct.qat.export.export import export_folder
from decoct.qat.layers.quantized_model import fold, quantize_model
from decoct.qat.rebuild import load_exported_model
from decoct.qat.scheme import QuantScheme, SpecChange
from decoct.qat.spec import QuantSpec
from decoct.qat.verify.verify import verify_folder

SIZES: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0,
    "eos_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
IDS = torch.arange(30)[None]


@pytest.fixture
def neox(tokenizer: Any, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """A quantized GPT-NeoX, its folder and the model in memory."""

    def build(**scheme: Any) -> tuple[Path, Any]:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **SIZES), dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        state = quantize_model(model, QuantScheme(weights=QuantSpec(bits=4, group_size=32), **scheme))
        fold(model, state)
        record, extra = {"quant": state.record()}, {"quant/codes.safetensors": state.tensors()}
        return save_model_folder(tmp_path / "quantized", model, tokenizer, record, dtype=torch.float32, extra_tensors=extra), model

    return build


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "safetensors"])
def test_every_format_is_written_under_the_names_of_files(neox: Callable[..., Any], tmp_path: Path, form: str) -> None:
    folder, model = neox()
    export_folder(folder, tmp_path / "export", form, runtimes=False, allow_inexact=form == "safetensors")
    stored = load_file(tmp_path / "export/model.safetensors")
    assert "embed_out.weight" in stored, "what servers look for"
    assert "lm_head.weight" not in stored
    report = verify_folder(tmp_path / "export", runtimes=False)
    assert report.problems == []
    if form != "safetensors":
        with torch.no_grad():
            assert torch.equal(load_exported_model(tmp_path / "export")(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_quantized_head_is_packed_under_the_name_of_the_file(neox: Callable[..., Any], tmp_path: Path) -> None:
    folder, model = neox(head=SpecChange(bits=8))
    assert "lm_head" in read_record(folder)["quant"]["modules"]
    export_folder(folder, tmp_path / "export", "compressed-tensors", runtimes=False)
    assert {"embed_out.weight_packed", "embed_out.weight_scale"} <= load_file(tmp_path / "export/model.safetensors").keys()
    groups = json.loads((tmp_path / "export/config.json").read_text())["quantization_config"]["config_groups"]
    targets = [group["targets"] for group in groups.values()]
    assert ["embed_out", "lm_head"] in targets, "vLLM looks for the one, transformers for the other"
    assert verify_folder(tmp_path / "export", runtimes=False).problems == []
    with torch.no_grad():
        assert torch.equal(load_exported_model(tmp_path / "export")(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_an_unquantized_head_is_ignored_under_both_names(neox: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = neox()
    export_folder(folder, tmp_path / "export", "compressed-tensors", runtimes=False)
    assert json.loads((tmp_path / "export/config.json").read_text())["quantization_config"]["ignore"] == ["embed_out", "lm_head"]


def test_a_folder_named_as_its_modules_is_read(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **SIZES), dtype=torch.bfloat16)
    folder = save_model_folder(tmp_path / "plain", model, tokenizer, {}, dtype=None)
    (folder / "decoct.json").unlink()
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("embed_out.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    export_folder(folder, tmp_path / "export", "safetensors", runtimes=False)
    assert torch.equal(load_file(tmp_path / "export/model.safetensors")["embed_out.weight"], model.lm_head.weight)


def test_further_heads_are_left_out_and_listed(tokenizer: Any, tmp_path: Path) -> None:
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention", "full_attention"]}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_5_text", **sizes), dtype=torch.bfloat16)
    folder = save_model_folder(tmp_path / "plain", model, tokenizer, {}, dtype=None)
    (folder / "decoct.json").unlink()
    weights = load_file(folder / "model.safetensors")
    more = {f"mtp.layers.0.{name}.weight": torch.ones(4, 4, dtype=torch.bfloat16) for name in ("up", "down")}
    save_file({**weights, **more, "mtp.fc.weight": torch.ones(4, 4)}, folder / "model.safetensors", metadata={"format": "pt"})
    export_folder(folder, tmp_path / "export", "safetensors", runtimes=False)
    assert load_file(tmp_path / "export/model.safetensors").keys() == weights.keys()
    assert read_record(tmp_path / "export")["left_out"] == {"mtp.layers.0.*": 2, "mtp.*": 1}
    card = (tmp_path / "export/README.md").read_text()
    assert "| Not included | 3 tensors that transformers does not load are left out: mtp." in card
    load_model(tmp_path / "export", dtype=torch.float32)
