"""Pre-tokenizers of byte-level BPE that llama.cpp has built in, by its names: how a text is split before merging.

The exporter looks up a name for the steps of a tokenizer.json, the import looks up the steps for a name. A name that is not here is
refused in both directions, because a wrong guess would split text differently without an error.

Source: llama.cpp ``llama-vocab.cpp`` (llm_tokenizer_bpe, llama_vocab::impl::load), ``conversion/base.py`` (get_vocab_base_pre).
"""

from typing import NamedTuple

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

GPT2, DIGITS = "gpt2", "digits"
"""Steps that are no pattern: GPT-2's own split, and every digit alone."""


class PreTokenizer(NamedTuple):
    """How a text is split."""

    steps: tuple[str, ...]
    """``GPT2``, ``DIGITS`` or regular expressions, one after another."""
    whole_words: bool = False
    """Whether a word that is a token is used without merging (ignore_merges)."""
    bos: bool = False
    """Whether llama.cpp puts bos before a text if the file does not say."""


_LLAMA3 = PreTokenizer((_CONTRACTIONS + r"\p{N}{1,3}" + _REST,), whole_words=True, bos=True)
_QWEN2 = PreTokenizer((_CONTRACTIONS + r"\p{N}" + _REST,))
_PLAIN, _SINGLE_DIGITS = PreTokenizer((GPT2,)), PreTokenizer((DIGITS, GPT2))
_TEKKEN = PreTokenizer((_UPPER + "|" + _LOWER + r"|\p{N}" + _SLASHES,), whole_words=True, bos=True)
_GPT4O = PreTokenizer((_UPPER + _ENDINGS + "|" + _LOWER + _ENDINGS + r"|\p{N}{1,3}" + _SLASHES,))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _PLAIN, "phi-2": _PLAIN, "mpt": _PLAIN, "olmo": _PLAIN, "jais": _PLAIN,
    "smollm": _SINGLE_DIGITS, "starcoder": _SINGLE_DIGITS, "refact": _SINGLE_DIGITS, "command-r": _SINGLE_DIGITS,
    "codeshell": _SINGLE_DIGITS, "exaone": _SINGLE_DIGITS, "minerva-7b": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "falcon3": _LLAMA3, "pixtral": _LLAMA3,
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "megrez": _QWEN2,
    "tekken": _TEKKEN,
    "gpt-4o": _GPT4O, "llama4": _GPT4O,
}  # fmt: skip
"""``tokenizer.ggml.pre`` -> split. The first name of a split is the one that is written."""
