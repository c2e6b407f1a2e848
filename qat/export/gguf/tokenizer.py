"""A tokenizer as GGUF metadata, so that llama.cpp splits text into the same tokens: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

llama.cpp has built-in pre-tokenizers, chosen by name. The name is looked up from the steps in tokenizer.json; unknown steps are refused,
because a wrong guess would split text differently without an error.

Source: llama.cpp ``llama-vocab.cpp`` (llm_tokenizer_bpe, llm_tokenizer_spm), ``conversion/base.py`` (get_vocab_base_pre).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....models.common.errors import UserError
from ....models.folder.loading import load_tokenizer
from ....models.gguf.pre_tokenizers import DIGITS, GPT2, PRE_TOKENIZERS
from .container import Value
from .sentencepiece import is_sentencepiece, sentencepiece_metadata

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# llama.cpp's enum llama_token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_NAMES = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken")
"""Names that every llama.cpp since 2024 knows."""
_PRE_TOKENIZERS = {PRE_TOKENIZERS[name].steps: (name, PRE_TOKENIZERS[name].whole_words) for name in _NAMES}
"""Steps of the pre-tokenizer -> (llama.cpp's name, whether a word that is a token is used without merging)."""


def tokenizer_metadata(folder: Path, rows: int) -> dict[str, Value]:
    """Return the ``tokenizer.*`` entries.

    Args:
        folder: A model folder with a tokenizer.
        rows: Rows of the embedding; those without a token become unused ``[PADi]``.

    Raises:
        UserError: no tokenizer, one without a llama.cpp equivalent (the message names the part), or ids beyond the embedding.
    """
    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{folder}: gguf needs a tokenizer in the form of tokenizer.json; {type(tokenizer).__name__} has none")
    # the tokenizer as transformers loads it
    content = json.loads(backend.to_str())
    if content["model"]["type"] != "BPE":
        raise UserError(f"{folder}: gguf holds BPE tokenizers (byte-level or SentencePiece), not {content['model']['type']}")
    added = {token["id"]: token for token in content["added_tokens"]}
    tokens = _tokens(folder, content["model"]["vocab"], added, rows)
    if is_sentencepiece(content):
        kind = sentencepiece_metadata(folder, content, tokens, set(added), rows)
    else:
        kind = _byte_level(folder, content)
    names = unique_names(tokens, rows)
    return {
        **kind,
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [_type(tokens.get(index), added.get(index), content) for index in range(rows)],
        **_special_tokens(folder, tokenizer),
        **_chat_templates(tokenizer),
    }


def unique_names(tokens: Mapping[int, str], rows: int) -> list[str]:
    """Return a unique name per row; rows without a token are called ``[PADi]``, or longer if a token has that text."""
    taken = set(tokens.values())
    names = []
    for index in range(rows):
        name = tokens.get(index)
        if name is None:
            name = f"[PAD{index}]"
            while name in taken:
                name = f"[{name}]"
            taken.add(name)
        names.append(name)
    return names


def _tokens(folder: Path, vocabulary: dict[str, int], added: dict[int, Any], rows: int) -> dict[int, str]:
    tokens = {index: token for token, index in vocabulary.items()} | {index: token["content"] for index, token in added.items()}
    if max(tokens, default=-1) >= rows:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {max(tokens):,}, the embedding {rows:,} rows; they are not of one model, or tokens "
            "were added without resizing the embedding"
        )
    if len(set(tokens.values())) != len(tokens):
        raise UserError(f"{folder}: two ids of the tokenizer have the same text, which llama.cpp cannot tell apart")
    return tokens


def _type(token: str | None, added: dict[str, Any] | None, content: dict[str, Any]) -> int:
    if token is None:
        return UNUSED
    # before the added tokens: the unknown token often is one of them
    if token == content["model"].get("unk_token"):
        return UNKNOWN
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    # <0x0A> is a byte token only where bytes fall back; in byte-level BPE it is plain text
    byte = is_sentencepiece(content) and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return BYTE if byte else NORMAL


def _byte_level(folder: Path, content: dict[str, Any]) -> dict[str, Value]:
    name, whole_words = _pre_tokenizer(folder, content)
    normalizer = content.get("normalizer")
    # llama.cpp skips Qwen's NFC normalization, which changes nothing for text that is already normalized
    if normalizer is not None and (normalizer["type"] != "NFC" or name != "qwen2"):
        raise UserError(f"{folder}: llama.cpp normalizes no text before byte-level BPE; the tokenizer has {normalizer['type']}")
    if bool(content["model"].get("ignore_merges")) != whole_words:
        raise UserError(f"{folder}: llama.cpp's {name!r} tokenizer has ignore_merges={whole_words}, tokenizer.json has the opposite")
    # older files have a pair as one text with a space already
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    if any(pair.count(" ") != 1 for pair in merges):
        raise UserError(f"{folder}: a merge of the tokenizer is not two tokens without spaces, so it is not byte-level BPE")
    # GGUF readers refuse empty arrays
    listed: dict[str, Value] = {"tokenizer.ggml.merges": merges} if merges else {}
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, **listed}


def _pre_tokenizer(folder: Path, content: dict[str, Any]) -> tuple[str, bool]:
    given = content.get("pre_tokenizer")
    parts = given["pretokenizers"] if given and given["type"] == "Sequence" else [given] if given else []
    known = _PRE_TOKENIZERS.get(tuple(step for part in parts for step in _steps(part)))
    if known is None or not any(part["type"] == "ByteLevel" for part in parts):
        names = ", ".join(sorted({name for name, _ in _PRE_TOKENIZERS.values()}))
        raise UserError(
            f"{folder}: decoct knows no llama.cpp name for the way in which the tokenizer splits text ({json.dumps(given)[:300]}); known "
            f"are {names} and SentencePiece. A tokenizer with GPT-2's pre-tokenizer works everywhere"
        )
    return known


def _steps(part: dict[str, Any]) -> list[str]:
    """Return a part of the pre-tokenizer as steps of ``_PRE_TOKENIZERS``; [] for a part that only maps bytes."""
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return [GPT2] if part["use_regex"] else []
    if part["type"] == "Digits" and part["individual_digits"]:
        return [DIGITS]
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return [part["pattern"].get("Regex", "?")]
    return ["?"]


def _special_tokens(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Value]:
    found: dict[str, Value] = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = index
    # encode a text: added tokens depend on the post-processor, not only on the tokenizer's attributes
    bare: Any = tokenizer.encode("a b", add_special_tokens=False)
    around: Any = tokenizer.encode("a b")
    front, back = _around(list(around), list(bare))
    if front not in ([], [tokenizer.bos_token_id]) or back not in ([], [tokenizer.eos_token_id]):
        raise UserError(f"{folder}: the tokenizer puts {front} before and {back} after a text; llama.cpp puts bos and eos there or nothing")
    return found | {"tokenizer.ggml.add_bos_token": bool(front), "tokenizer.ggml.add_eos_token": bool(back)}


def _around(whole: list[int], bare: list[int]) -> tuple[list[int], list[int]]:
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return whole, []


def _chat_templates(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Value]:
    template: Any = tokenizer.chat_template
    if not template:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    # the default is the one that servers use unless a request names another
    named = {name: text for name, text in template.items() if name != "default"}
    default = template.get("default") or next(iter(named.values()))
    listed: dict[str, Value] = {"tokenizer.chat_templates": sorted(named)} if named else {}
    return {"tokenizer.chat_template": default, **listed, **{f"tokenizer.chat_template.{name}": text for name, text in named.items()}}
