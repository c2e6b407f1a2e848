"""Documents as token ids."""

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from decoct.models.common.errors import UserError
from decoct.trainer.data import tokens
from decoct.trainer.data.tokens import TokenStream, tokenizer_hash, write_tokens
from decoct.trainer.data.unfinished import Unfinished


def write(documents: list[str], tokenizer: PreTrainedTokenizerBase, path: Path, need_end: bool = True) -> TokenStream:
    with closing(Unfinished(path)) as work:
        return write_tokens(documents, tokenizer, work, say=print, need_end=need_end)


def with_start(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, but with ``a`` as begin-of-text, put before every text as Llama's does."""
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    other = deepcopy(tokenizer)
    other.bos_token = "a"
    backend: Any = other.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="a $A", special_tokens=[("a", other.bos_token_id)])
    return other


def test_each_document_is_its_tokens_and_an_end_of_text(tokenizer: PreTrainedTokenizerBase, texts: list[str], tmp_path: Path) -> None:
    stream = write(texts, tokenizer, tmp_path / "s")
    assert len(stream.bounds) == len(texts) + 1
    for number, text in enumerate(texts):
        ids = stream.tokens[stream.bounds[number] : stream.bounds[number + 1]].tolist()
        assert ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert len(np.unique(stream.hashes)) == len(texts)


def test_begin_of_text_is_put_where_the_tokenizer_itself_does(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    other = with_start(tokenizer)
    stream = write(["cat", "dog"], other, tmp_path / "s")
    expected = [*other("cat")["input_ids"], other.eos_token_id, *other("dog")["input_ids"], other.eos_token_id]
    assert stream.tokens[:].tolist() == expected
    assert expected[0] == other.bos_token_id != other.eos_token_id


@pytest.mark.parametrize("started", [False, True], ids=["plain", "begin-of-text"])
def test_batches_and_pieces_change_nothing(
    started: bool, tokenizer: PreTrainedTokenizerBase, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = with_start(tokenizer) if started else tokenizer
    long = "".join(text + "\n" for text in texts)
    whole = write([long, *texts], tokenizer, tmp_path / "whole")
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 400)
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 100)
    pieces = write([long, *texts], tokenizer, tmp_path / "pieces")
    assert pieces.tokens[:].tolist() == whole.tokens[:].tolist()
    assert pieces.bounds.tolist() == whole.bounds.tolist()
    assert pieces.hashes.tolist() == whole.hashes.tolist()


def test_a_line_longer_than_a_piece_is_cut_without_loss(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 10)
    text = "no line end in all of this text, nowhere"
    stream = write([text], tokenizer, tmp_path / "s")
    assert tokenizer.decode(stream.tokens[:-1].tolist()) == text
    assert len(stream.bounds) == 2


def test_packing_needs_an_end_of_text_token(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.eos_token = None
    with pytest.raises(UserError, match=r"no end-of-text token.*data\.packing: false"):
        write(["cat"], other, tmp_path / "s")
    assert write(["cat"], other, tmp_path / "s", need_end=False).tokens[:].tolist() == tokenizer("cat")["input_ids"]


def test_tokenizer_hash_ignores_passing_padding_and_sees_a_changed_token(tokenizer: PreTrainedTokenizerBase) -> None:
    from copy import deepcopy

    before = tokenizer_hash(tokenizer)
    other = deepcopy(tokenizer)
    other.pad_token = other.eos_token
    padded = tokenizer_hash(other)
    other(["a", "a cat sat"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(other) == padded != before
    assert tokenizer_hash(deepcopy(tokenizer)) == before
    assert tokenizer_hash(with_start(tokenizer)) != before


@pytest.mark.parametrize(("before", "after"), [("false", "false"), ("true", "true"), (None, "false")])
def test_parallelism_chosen_by_the_user_is_kept(
    before: str | None, after: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", before or "")
    if before is None:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    write(["cat"], tokenizer, tmp_path / "s")
    assert os.environ["TOKENIZERS_PARALLELISM"] == after
