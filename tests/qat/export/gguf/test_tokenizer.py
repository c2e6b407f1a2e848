"""Tokenizers get the name of the pre-tokenizer that llama.cpp has built in, or none at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from decoct.models.common.errors import UserError
from decoct.qat.export.gguf.tokenizer import tokenizer_metadata, unique_names

TEXT = ["def f(x):\n    return x + 1\n", "Hello, hello 123 worlds and words; it's \u00e9t\u00e9"] * 8
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def byte_level(pre: Any, **model: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def saved(folder: Path, tokenizer: Tokenizer, **special: Any) -> Path:
    given = {"bos_token": "<s>", "eos_token": "</s>", **special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **given).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])


@pytest.mark.parametrize(
    ("pre", "model", "name"),
    [(GPT2, {}, "gpt-2"), (SMOLLM, {}, "smollm"), (split(LLAMA3), {"ignore_merges": True}, "llama-bpe"), (split(QWEN2), {}, "qwen2")],
)
def test_known_pre_tokenizers_have_a_name(tmp_path: Path, pre: Any, model: dict[str, Any], name: str) -> None:
    tokenizer = byte_level(pre, **model)
    tokenizer.add_tokens([AddedToken("<user>", special=False, normalized=False)])
    if name == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder, size = saved(tmp_path, tokenizer), tokenizer.get_vocab_size()
    found: dict[str, Any] = dict(tokenizer_metadata(folder, size + 2))
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert found["tokenizer.ggml.add_bos_token"] is (name == "llama-bpe")
    assert found["tokenizer.ggml.add_eos_token"] is False
    tokens, types, merges = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges"))
    assert {token: index for index, token in enumerate(tokens[:size])} == tokenizer.get_vocab()
    assert tokens[size:] == [f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert types == [3, 3, *[1] * (size - 3), 4, 5, 5]
    assert merges == [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: byte_level(split(r"\w+|\s+")), "no llama.cpp name for .*known are gpt-2, llama-bpe, qwen2"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "no llama.cpp name for"),
        (lambda: byte_level(split(LLAMA3)), "'llama-bpe' tokenizer has ignore_merges=True"),
        (lambda: byte_level(GPT2, ignore_merges=True), "'gpt-2' tokenizer has ignore_merges=False"),
        (lambda: Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, "a")), "not WordLevel"),
    ],
)
def test_unknown_tokenizers_are_refused(tmp_path: Path, tokenizer: Callable[[], Tokenizer], message: str) -> None:
    folder = saved(tmp_path, tokenizer())
    with pytest.raises(UserError, match=message):
        tokenizer_metadata(folder, 400)


def test_a_normalizer_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level(GPT2)
    tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="the tokenizer has Lowercase"):
        tokenizer_metadata(saved(tmp_path, tokenizer), 400)


def test_what_is_put_around_a_text_must_be_bos_and_eos(tmp_path: Path) -> None:
    tokenizer = byte_level(GPT2)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    with pytest.raises(UserError, match=r"puts \[1\] before and \[\] after"):
        tokenizer_metadata(saved(tmp_path, tokenizer), 400)


def test_padding_never_repeats_a_token() -> None:
    assert unique_names({0: "a", 1: "[PAD2]", 2: "[PAD3]"}, 5) == ["a", "[PAD2]", "[PAD3]", "[[PAD3]]", "[PAD4]"]


PIECES = ["\u2581", "a", "b", "c", "\u2581a", "ab", "abc", "bc"]


def sentencepiece(
    *, merges: list[tuple[str, str]] | None = None, pieces: list[str] = PIECES, normalizer: Any = None, pre: Any = None
) -> Tokenizer:
    """As transformers makes one of a SentencePiece model: every way to cut a piece, best piece first."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    vocabulary |= {piece: 259 + index for index, piece in enumerate(pieces)}
    cuts = [(piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece)) if {piece[:cut], piece[cut:]} <= set(pieces)]
    model = models.BPE(vocabulary, cuts if merges is None else merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    llama = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.normalizer = normalizer or (None if pre else llama)
    tokenizer.pre_tokenizer = pre
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_sentencepiece_has_scores_and_bytes(tmp_path: Path) -> None:
    found: dict[str, Any] = dict(tokenizer_metadata(saved(tmp_path, sentencepiece(), unk_token="<unk>"), 268))
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.add_bos_token"]) == ("llama", True)
    assert found["tokenizer.ggml.token_type"] == [2, 3, 3, *[6] * 256, *[1] * 8, 5]
    scores = {token: score.value for token, score in zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True)}
    assert scores["\u2581a"] > scores["ab"] > scores["abc"] > scores["bc"]
    assert found["tokenizer.ggml.add_space_prefix"] is True


@pytest.mark.parametrize(
    ("parts", "prefix"),
    [
        ({"pre": pre_tokenizers.Metaspace(prepend_scheme="first", split=False)}, True),
        ({"pre": pre_tokenizers.Metaspace(prepend_scheme="never", split=False)}, False),
        ({"normalizer": normalizers.Replace(" ", "\u2581"), "pre": pre_tokenizers.Split(" ", "merged_with_previous")}, False),
    ],
)
def test_how_sentencepiece_treats_the_first_space(tmp_path: Path, parts: dict[str, Any], prefix: bool) -> None:
    (folder := tmp_path / "x").mkdir()
    tokenizer = sentencepiece(**parts)
    saved(folder, tokenizer, unk_token="<unk>")
    # AutoTokenizer would build Llama's own form of it
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert tokenizer_metadata(folder, 268)["tokenizer.ggml.add_space_prefix"] is prefix


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: sentencepiece(merges=[("\u2581", "a"), ("a", "b"), ("ab", "c"), ("b", "c")]), "would join 'a' and 'bc'"),
        (
            lambda: sentencepiece(merges=[("\u2581", "a"), ("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")]),
            "merges of 'abc' are not adjacent",
        ),
        (lambda: sentencepiece(normalizer=normalizers.Lowercase()), "how the tokenizer treats spaces"),
    ],
)
def test_what_sentencepiece_cannot_do_is_refused(tmp_path: Path, tokenizer: Callable[[], Tokenizer], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokenizer_metadata(saved(tmp_path, tokenizer(), unk_token="<unk>"), 268)


def test_no_tokenizer_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no tokenizer"):
        tokenizer_metadata(tmp_path, 10)
