"""A tokenizer with an id beyond the embedding, as Gemma 3's text models have: no text gives it, so that it stands in nobody's way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoct.launch.cli.app import main
from decoct.models.folder.loading import load_model
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

TEXT = "kado lota mifi nugu pera rado lofi migu nuta pedo. " * 40


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer([TEXT], 270)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _distil(model: Path, tmp_path: Path, text: str, *more: str) -> int:
    (tmp_path / "text").mkdir(exist_ok=True)
    for part in range(8):
        (tmp_path / f"text/{part}.txt").write_text(text + str(part))
    arguments = ["distill", str(model), "--teacher", str(model), "--text", str(tmp_path / "text/*.txt"), "--seq-length", "32"]
    settings = ["tokens=null", "steps=1", "data.eval_tokens=64", "trainer.global_batch_tokens=64", "trainer.precision=32", *more]
    try:
        main([*arguments, *settings, "--out", str(tmp_path / "run")])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_it_is_said_and_trained(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _distil(model, tmp_path, TEXT) == 0, capsys.readouterr()
    said = " ".join(capsys.readouterr().out.split())
    assert "vocabulary: one token has no row in the embedding of" in said
    assert "'<image_soft_token>'); the text has none of them" in said
    student: Any = load_model(tmp_path / "run/01-distill/model", dtype=torch.float32)
    assert student.config.vocab_size == load_model(model, dtype=torch.float32).config.vocab_size


def test_text_with_such_a_token_is_refused_by_name(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _distil(model, tmp_path, TEXT + " <image_soft_token> ") == 2
    error = capsys.readouterr().err
    assert "the text has the token '<image_soft_token>' (id" in error
    assert " 8 times" in error
    assert not (tmp_path / "run").exists()


def test_a_pad_token_beyond_the_rows_pads_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from decoct.models.folder.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    tokenizer.pad_token = "<image_soft_token>"
    tokenizer.save_pretrained(model)
    assert _distil(model, tmp_path, TEXT, "data.packing=false") == 0, capsys.readouterr()
