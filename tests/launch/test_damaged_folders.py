"""Every verb that opens a folder finds a flipped bit in it, says which file, and ends with exit code 2 and nothing made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoct.launch.cli.app import main
from decoct.models.folder.codes_file import CODES
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer
from decoct.qat.layers.quantized_model import fold, quantize_model
from decoct.qat.spec import QuantSpec

VERBS = {
    "evaluate": ["--tokens", "1k"],
    "prune": ["--keep", "0.5"],
    "quantize": ["--bits", "8", "--group-size", "channel"],
    "distill": ["--tokens", "1k"],
    "qat": ["--tokens", "1k", "--group-size", "16"],
}


@pytest.fixture
def folder(corpus: Path, tmp_path: Path) -> Path:
    """A quantized folder: every verb opens it."""
    tokenizer = train_tokenizer([next(corpus.iterdir()).read_text()], 300)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).eval()
    state = quantize_model(model, QuantSpec(bits=4, group_size=16), ())
    fold(model, state)
    tensors = {CODES: state.tensors()}
    return save_model_folder(tmp_path / "model", model, tokenizer, {"quant": state.record()}, dtype=torch.float32, extra_tensors=tensors)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-9] ^= 4
    file.write_bytes(data)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_stage_refuses_what_is_not_what_was_measured(
    folder: Path, corpus: Path, tmp_path: Path, verb: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(folder / name)
    text = ["--text", str(corpus / "0*.txt"), "--seq-length", "32"]
    teacher = ["--teacher", str(folder)] if verb == "distill" else []
    said = refused([verb, str(folder), *VERBS[verb], *text, *teacher, "--out", str(tmp_path / "out")], capsys)
    assert f"{folder / name} has changed since it was written" in said
    assert not list((tmp_path / "out").glob("*/model"))


@pytest.mark.parametrize("name", ["model.safetensors", CODES, "tokenizer.json", "generation_config.json", "decoct.json"])
def test_export_refuses_it_too(folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flip(folder / name)
    said = refused(["export", str(folder), "--format", "safetensors", "--out", str(tmp_path / "out")], capsys)
    assert str(folder / name) in said
    assert not (tmp_path / "out").exists()


def test_the_way_that_the_message_names_lets_a_change_of_ones_own_pass(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_new_tokens": 7}))
    verify = ["verify", str(folder), "--no-runtimes"]
    assert "generation_config.json has changed since it was written" in refused(verify, capsys)
    with pytest.raises(SystemExit) as ended:
        main([*verify, "--accept", "generation_config.json"])
    assert ended.value.code in (0, None)
    assert "files have their recorded sha256" in capsys.readouterr().out
