"""A small byte-level tokenizer and documents for the tests of this folder."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SENTENCES = ("the cat sat on the mat. ", "a dog ran over the hill. ", "x = [i * 2 for i in range(10)]\n", "rain fell all day. ")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE of 300 tokens with ``<|endoftext|>``; encodes and decodes any text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", bos_token="<|endoftext|>", model_max_length=32)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sixty different documents of different lengths."""
    return [f"document {n}: " + SENTENCES[n % 4] * (1 + n % 7) for n in range(60)]


@pytest.fixture
def text_files(tmp_path: Path, texts: Sequence[str]) -> str:
    """The documents as .txt files; returns the glob that finds them."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text)
    return str(folder / "*.txt")
