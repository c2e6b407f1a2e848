"""The trained tokenizer: lossless, deterministic, and the same after a trip through a folder and AutoTokenizer."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from decoct.models.common.errors import UserError
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n\n\n" * 3, "The quick brown fox doesn't jump.\t\t" * 4, "größe 漢字 🙂 " * 2]
AWKWARD = [
    "  leading and   runs  of spaces ",
    "\n\n\t \r\n tabs\tand\x0b\x0c\x00controls\x7f",
    "don 't , isn 't . we 'll ? ok !",
    "e\u0301 vs \u00e9, \u212b vs \u00c5, \ufb01",
    "🙂👩‍👩‍👧 漢字 \u202eabc\u202c \u00a0\u3000",
    "a<|endoftext|>b <|endoftext|>",
    "<|endoftext",
    "",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


@pytest.mark.parametrize("text", AWKWARD)
def test_any_text_survives(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_unicode_survives(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(0 <= index < len(tokenizer) for index in ids)


def test_special_token_and_sizes(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token) == (0, 0, 0, None)
    assert len(tokenizer) == 300
    assert tokenizer("hello")["input_ids"] == tokenizer("hello", add_special_tokens=False)["input_ids"], "nothing is added to a text"
    assert set(tokenizer("hello")) == {"input_ids", "attention_mask"}


def test_it_learned_merges(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer("return a + b")["input_ids"]) < len("return a + b") / 2


def test_splits_like_gpt2(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("don't  stop 123!")]
    assert pieces == ["don", "'t", "Ġ", "Ġstop", "Ġ123", "!"]


def test_same_text_gives_the_same_tokenizer_in_other_processes() -> None:
    code = "from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer; "
    code += f"print(train_tokenizer({TEXTS!r}, 300).backend_tokenizer.to_str())"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stdout.strip() == train_tokenizer(iter(TEXTS), 300).backend_tokenizer.to_str()


def test_auto_tokenizer_gives_it_back_beside_a_llama_config(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    LlamaConfig(vocab_size=300).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, PreTrainedTokenizerFast)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again.clean_up_tokenization_spaces is False, "other versions of transformers would take out spaces before punctuation"
    for text in AWKWARD:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == text


def test_too_small_a_vocabulary_and_no_text_are_refused() -> None:
    assert len(train_tokenizer(["aaaa"], 257)) == 257
    with pytest.raises(UserError, match="256 is too small"):
        train_tokenizer(TEXTS, 256)
    for nothing in ([], ["", ""]):
        with pytest.raises(UserError, match="no text"):
            train_tokenizer(nothing, 300)
