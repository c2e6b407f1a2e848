"""Sizes of exports from shapes. tests/qat/export/test_plan_agrees.py compares them with written files."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig

from decoct.launch.plan.export_sizes import export_bytes
from decoct.launch.plan.shapes import shape_of
from decoct.qat.scheme import QuantScheme
from decoct.qat.spec import QuantSpec


def trained(folder: Path, vocabulary: int) -> Path:
    """A folder with a byte-level tokenizer of the standard library's source."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False)  # pyright: ignore[reportCallIssue]
    tokenizer.train([str(file) for file in sorted(Path(os.__file__).parent.glob("*.py"))[:30]], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}))
    return folder


@pytest.mark.parametrize("vocabulary", [300, 2048])
def test_without_a_tokenizer_a_gguf_file_is_estimated_from_its_vocabulary(vocabulary: int, tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
    shape, scheme = shape_of(config, "a test"), QuantScheme(weights=QuantSpec(bits=4, group_size=32))
    rest = export_bytes("gguf", shape_of(LlamaConfig(**{**config.to_dict(), "vocab_size": 2}), "a test"), scheme)
    estimated, exact = (export_bytes("gguf", shape, scheme, tokenizer=at) for at in (None, trained(tmp_path, vocabulary)))
    table = 2 * 2 * 32 * vocabulary  # embedding and head in bf16
    assert estimated - rest - table == pytest.approx(exact - rest - table, rel=0.15)
