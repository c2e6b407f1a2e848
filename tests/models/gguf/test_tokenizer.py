"""A tokenizer that was exported to GGUF and imported again splits every text as before; one that cannot be rebuilt is refused."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from decoct.models.common.errors import UserError
from decoct.models.gguf.container import read_gguf
from decoct.models.gguf.fields import Fields
from decoct.models.gguf.pre_tokenizers import DIGITS, GPT2, PRE_TOKENIZERS
from decoct.models.gguf.tokenizer import tokenizer_of
from decoct.qat.export.gguf.tokenizer import tokenizer_metadata

from ...support.gguf_files import write_gguf

TEXTS = (
    "Hello, hello 12345 worlds; it's \u00e9t\u00e9 (don't)\n\n\n  and\tmore   spaces ", "", " ", "   x", "<user> and </s> and <s>",
    "日本語 🙂👩‍👩‍👧 naïve CAFÉ I'LL we'Ve", "def f(x):\n    return x ** 2  # 3.14\r\n", "a\u0301 \u00e1 \ufb01",
)  # fmt: skip
CORPUS = ["def f(x):\n    return x + 1\n", "Hello, hello 123 worlds and words; it's \u00e9t\u00e9", *TEXTS] * 8


def steps_of(name: str) -> Any:
    parts = []
    for step in PRE_TOKENIZERS[name].steps:
        if step == DIGITS:
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != GPT2:
            parts.append(pre_tokenizers.Split(Regex(step), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=PRE_TOKENIZERS[name].steps[-1] == GPT2))
    return pre_tokenizers.Sequence(parts)


def byte_level(name: str) -> Tokenizer:
    tokenizer: Any = Tokenizer(models.BPE(ignore_merges=PRE_TOKENIZERS[name].whole_words))
    tokenizer.pre_tokenizer, tokenizer.decoder = steps_of(name), decoders.ByteLevel()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer: Any = trainers.BpeTrainer(vocab_size=360, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<user>", special=False, normalized=False)])
    return tokenizer


def sentencepiece(prefix: bool) -> Tokenizer:
    """Every split of every piece is among the merges, those of earlier pieces first, as lists made of a SentencePiece model are."""
    pieces = ["▁", *"abcdefhilnorstuwx", "▁h", "el", "lo", "▁hel", "▁hello", "or", "▁w", "wor", "▁wor", "ld", "▁world", "in", "▁▁"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    known = set(pieces)
    merges = [(p[:cut], p[cut:]) for p in pieces for cut in range(1, len(p)) if p[:cut] in known and p[cut:] in known]
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer: Any = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else normalizers.Sequence([replace])
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(content=" ", left=1, right=0)] if prefix else parts)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("<user>", special=False, normalized=False)])
    return tokenizer


def saved(folder: Path, backend: Any, front: bool, **special: Any) -> PreTrainedTokenizerFast:
    if front:
        index = backend.token_to_id("<s>")
        template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", index)])
        backend.post_processor = template
    given = {"bos_token": "<s>", "eos_token": "</s>", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **given)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return tokenizer


def again(tmp_path: Path, size: int, **changes: Any) -> Any:
    keys = dict(tokenizer_metadata(tmp_path, size))
    plain = {name: [getattr(one, "value", one) for one in value] if isinstance(value, list) else value for name, value in keys.items()}
    plain |= {name.replace("__", "."): value for name, value in changes.items()}
    file = write_gguf(tmp_path / "model.gguf", "llama", {**plain, "context_length": 64}, {})
    return tokenizer_of(Fields(read_gguf(file)), size)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
@pytest.mark.parametrize("front", [True, False])
def test_byte_level_bpe_comes_back(name: str, front: bool, tmp_path: Path) -> None:
    backend = byte_level(name)
    before = saved(tmp_path, backend, front, chat_template="{{ messages[0]['content'] }}{{ bos_token }}")
    # two rows more than tokens: padding of the embedding
    found = again(tmp_path, backend.get_vocab_size() + 2)
    assert found.get_vocab() == before.get_vocab()
    for text in TEXTS:
        assert found.encode(text) == before.encode(text), text
        assert found.encode(text, add_special_tokens=False) == before.encode(text, add_special_tokens=False)
        assert found.decode(found.encode(text)) == before.decode(before.encode(text))
    assert found.encode("a", "b") == before.encode("a", "b")
    chat = [{"role": "user", "content": "Hello"}]
    assert found.apply_chat_template(chat, tokenize=False) == before.apply_chat_template(chat, tokenize=False) == "Hello<s>"
    assert found.special_tokens_map == before.special_tokens_map
    # as it is loaded from its folder
    found.save_pretrained(tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [loaded.encode(text) for text in TEXTS] == [before.encode(text) for text in TEXTS]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("front", [True, False])
def test_sentencepiece_comes_back(prefix: bool, front: bool, tmp_path: Path) -> None:
    backend = sentencepiece(prefix)
    before = saved(tmp_path, backend, front, unk_token="<unk>")
    found = again(tmp_path, backend.get_vocab_size() + 1)
    assert found.get_vocab() == before.get_vocab()
    for text in (*TEXTS, "hello world", "hello  world  in", "worldworld hello\nworld"):
        assert found.encode(text) == before.encode(text), text
        assert found.decode(found.encode(text)) == before.decode(before.encode(text))
    loaded = AutoTokenizer.from_pretrained(saved_again(found, tmp_path / "out"))
    assert [loaded.encode(text) for text in TEXTS] == [before.encode(text) for text in TEXTS]


def saved_again(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def test_runs_of_spaces_are_one_token_before_anything_is_merged(tmp_path: Path) -> None:
    """Gemma's user-defined tokens: two spaces are '▁▁' also where '▁hello' would be merged first."""
    backend = sentencepiece(False)
    saved(tmp_path, backend, False, unk_token="<unk>")
    size = backend.get_vocab_size()
    keys = dict(tokenizer_metadata(tmp_path, size))
    tokens, types = list(keys["tokenizer.ggml.tokens"]), list(keys["tokenizer.ggml.token_type"])  # pyright: ignore[reportArgumentType]
    at = tokens.index("▁▁")
    tokens[at], types[at] = "  ", 4
    found = again(tmp_path, size, tokenizer__ggml__tokens=tokens, tokenizer__ggml__token_type=types)
    assert found.convert_ids_to_tokens(found.encode("x  hello")) == ["x", "▁▁", "h", "el", "lo"]
    assert found.decode(found.encode("x  hello")) == "x  hello"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer__ggml__model": "rwkv"}, r"kind 'rwkv' \(it knows gpt2 and llama\)"),
        ({"tokenizer__ggml__pre": "superbpe"}, "splits text by llama.cpp's 'superbpe'"),
        ({"tokenizer__ggml__token_type": [1, 2]}, "2 token types for"),
        ({"tokenizer__ggml__merges": ["a b c"]}, "'a b c' among the merges is not two tokens"),
        (
            {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__bos_token_id": 9999},
            "add_bos_token is true, but bos_token_id is 9999",
        ),
        ({"tokenizer__ggml__tokens": ["a"] * 5, "tokenizer__ggml__token_type": [1] * 5}, "two ids of the tokenizer have the same text"),
        ({"tokenizer__ggml__tokens": ["a", "b"] * 400}, "has 800 tokens, the embedding"),
        ({"tokenizer__ggml__model": "llama"}, "scores is not one finite number per token"),
        ({"tokenizer__chat_template": 7}, "chat_template is 7; expected text"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    backend = byte_level("gpt-2")
    saved(tmp_path, backend, False)
    with pytest.raises(UserError, match=message):
        again(tmp_path, backend.get_vocab_size(), **changes)
