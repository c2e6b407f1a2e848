"""Tensors beside the model that transformers does not load are said when a run starts, and noted in each folder that it writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.configs.loader import recipe_from_dict
from decoct.launch.cli.app import main
from decoct.launch.run.left_out import left_out_of
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "layer_types": ["full_attention"], "vocab_size": 270,
}  # fmt: skip
TEXT = "kado lota mifi nugu pera rado lofi migu nuta pedo. " * 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_5_text", **SIZES)).save_pretrained(tmp_path / "model")
    train_tokenizer([TEXT], 270).save_pretrained(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    save_file({**load_file(file), "mtp.layers.0.up.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    return tmp_path / "model"


def test_they_are_said_and_noted(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    for part in range(6):
        (tmp_path / f"text/{part}.txt").write_text(TEXT + str(part))
    arguments = [str(model), "--bits", "4", "--group-size", "32", "--text", str(tmp_path / "text/*.txt"), "--seq-length", "32"]
    with pytest.raises(SystemExit) as ended:
        main(["quantize", *arguments, "data.eval_tokens=64", "--out", str(tmp_path / "run")])
    assert not ended.value.code, capsys.readouterr()
    said = " ".join(capsys.readouterr().out.split())
    assert "one tensor that transformers does not load is left out: mtp.layers.0.* (1)" in said
    written = tmp_path / "run/01-quantize/model"
    assert json.loads((written / "decoct.json").read_text())["left_out"] == {"mtp.layers.0.*": 1}
    assert not any("mtp" in name for name in load_file(written / "model.safetensors"))
    plain = {"name": "x", "student": {"path": str(written)}, "data": {"builtin": "python-stdlib"}, "stages": [{"export": {}}]}
    assert left_out_of(recipe_from_dict(plain)) == {"mtp.layers.0.*": 1}, "what a folder notes goes on"
