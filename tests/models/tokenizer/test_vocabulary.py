"""V_eff counts tokens, not rows; two tokenizers are the same when every id means the same token."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from decoct.models.common.errors import UserError
from decoct.models.tokenizer.vocabulary import check_head_rows, check_same_vocabulary, effective_vocab, embedding_rows, tokens_without_rows


def _tokenizer(*tokens: str, **vocabulary: int) -> PreTrainedTokenizerFast:
    ids = vocabulary or {token: index for index, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(ids, unk_token=next(iter(ids), "a"))))


def test_effective_vocab_is_the_highest_id_plus_one_with_added_tokens() -> None:
    tokenizer = _tokenizer("a", "b", "c")
    assert effective_vocab(tokenizer) == 3
    tokenizer.add_tokens(["<new>", "b"])
    assert effective_vocab(tokenizer) == 4
    assert effective_vocab(_tokenizer(a=0, b=9)) == 10, "holes in the ids count"
    with pytest.raises(UserError, match="no tokens"):
        effective_vocab(_tokenizer())


def test_ids_beyond_the_rows_of_a_model_do_not_count(tiny_model: Callable[..., Any]) -> None:
    tokenizer = _tokenizer("a", "b", "c")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert effective_vocab(tokenizer, 8, None) == 4
    assert effective_vocab(tokenizer, 8, 3) == 3
    assert tokens_without_rows(tokenizer, 3) == {3: "<image>"}
    assert tokens_without_rows(tokenizer, 4) == {}
    assert embedding_rows(tiny_model("llama", vocab_size=64).config) == 64


def test_the_same_tokens_in_another_tokenizer_object_are_the_same_vocabulary() -> None:
    one, two = _tokenizer("a", "b", "c"), _tokenizer("a", "b")
    two.add_tokens(["c"])
    assert check_same_vocabulary(one, two) == 3


def test_different_vocabularies_are_refused_with_sizes_and_first_differences() -> None:
    with pytest.raises(UserError, match=r"3 and 3 tokens; 2 differ") as raised:
        check_same_vocabulary(_tokenizer("a", "b", "c"), _tokenizer("a", "c", "b"))
    assert "id 1: teacher 'b', student 'c'; id 2: teacher 'c', student 'b'" in str(raised.value)
    with pytest.raises(UserError, match=r"2 and 3 tokens; 1 differ\): id 2: teacher nothing, student 'c'"):
        check_same_vocabulary(_tokenizer("a", "b"), _tokenizer("a", "b", "c"))


@pytest.mark.parametrize("tied", [True, False])
def test_padded_heads_pass_and_short_ones_are_refused(tiny_model: Callable[..., Any], tied: bool) -> None:
    model = tiny_model("llama", vocab_size=64, tie_word_embeddings=tied)
    check_head_rows(model, 64)
    check_head_rows(model, 50)
    with pytest.raises(UserError, match=r"output head of LlamaForCausalLM has 64 rows but its tokenizer has ids up to 64"):
        check_head_rows(model, 65)


def test_a_model_without_a_head_is_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="has no output head"):
        check_head_rows(tiny_model("llama").model, 10)
