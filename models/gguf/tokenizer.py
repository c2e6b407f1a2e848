"""The tokenizer of a GGUF file as a tokenizer.json: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

A tokenizer that cannot be rebuilt with the same ids for every text is refused by name. Tokens of type control become special tokens,
user-defined ones are found whole in a text, as in llama.cpp. Unused rows called ``[PADi]`` are no tokens.

Source: llama.cpp ``llama-vocab.cpp``; gguf-py ``constants.py`` (TokenType); transformers ``convert_slow_tokenizer.py``.
"""

import re
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from ..tokenizer.tokenizer_checks import read_safely
from .fields import Fields
from .pre_tokenizers import DIGITS, GPT2, PRE_TOKENIZERS, PreTokenizer
from .sentencepiece import sentencepiece_backend

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_HOLE = re.compile(r"\[+PAD(\d+)\]+")
_TRIAL = "Hello, world! 123  é\n\t🙂 don't " + "a" * 50
_REMEDY = "give a folder that has the model's tokenizer: decoct import FILE --out MODEL --tokenizer FOLDER"


def tokenizer_of(fields: Fields, rows: int) -> "PreTrainedTokenizerFast":
    """Rebuild the tokenizer, with its chat template and special tokens.

    Args:
        fields: The file's metadata.
        rows: Rows of the embedding.

    Raises:
        UserError: the file has no tokenizer, more tokens than rows, a kind or a split that decoct does not know, or tokens that
            contradict each other.
    """
    from transformers import PreTrainedTokenizerFast

    kind = fields.text("tokenizer.ggml.model", None)
    tokens = fields.items("tokenizer.ggml.tokens", str, None)
    if kind is None or not tokens:
        raise UserError(f"{fields.file.path} has no tokenizer; {_REMEDY}")
    # more tokens than rows would index beyond the embedding
    if len(tokens) > rows:
        raise UserError(f"{fields.file.path}: the tokenizer has {len(tokens):,} tokens, the embedding {rows:,} rows; the file is damaged")
    # without types every token is normal
    types = fields.items("tokenizer.ggml.token_type", int, None) or [1] * len(tokens)
    if len(types) != len(tokens):
        raise UserError(f"{fields.file.path}: {len(types):,} token types for {len(tokens):,} tokens; the file is damaged")
    what = f"the tokenizer of {fields.file.path} cannot be rebuilt"
    try:
        backend = read_safely(what, lambda: _backend(fields, kind, tokens, types))
    # its message is complete already
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain exceptions: merges without tokens and the like
        raise UserError(f"{what}: {str(error).strip():.300}; {_REMEDY}") from error
    special = {name: _token(fields, tokens, key) for name, key in _SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        # without None: transformers would register it as a token
        **{name: token for name, token in special.items() if token is not None},
        clean_up_tokenization_spaces=False,
        model_max_length=fields.whole(".context_length"),
        model_input_names=["input_ids", "attention_mask"],
        chat_template=_chat_templates(fields),
    )


def _backend(fields: Fields, kind: str, tokens: list[str], types: list[int]) -> "Tokenizer":
    from tokenizers import processors

    # holes only fill the vocabulary up to its rows
    real = {index: token for index, token in enumerate(tokens) if not (types[index] == UNUSED and _is_hole(token, index))}
    if len(set(real.values())) != len(real):
        raise UserError(f"{fields.file.path}: two ids of the tokenizer have the same text; {_REMEDY}")
    if kind == "gpt2":
        split = _split(fields)
        backend, bos = _byte_level(fields, split, real), split.bos
    elif kind == "llama":
        # llama.cpp puts bos before a text of this kind unless the file says otherwise
        backend, bos = sentencepiece_backend(fields, real, types), True
    else:
        raise UserError(f"{fields.file.path}: decoct cannot rebuild a tokenizer of kind {kind!r:.100} (it knows gpt2 and llama); {_REMEDY}")
    _add_tokens(backend, fields, real, types, sentencepiece=kind == "llama")
    around = _around(fields, tokens, bos)
    if any(around):
        front, back = ([f"{token}:0" for _, token in side] for side in around)
        # bos and eos as a template, so that tokenizers adds them at every call
        template: Any = processors.TemplateProcessing(
            single=[*front, "$A:0", *back],
            pair=[*front, "$A:0", *back, *(f"{token}:1" for _, token in around[0]), "$B:1", *(f"{token}:1" for _, token in around[1])],
            special_tokens=list({(token, index) for side in around for index, token in side}),
        )
        # after the byte-level step, which corrects offsets
        backend.post_processor = processors.Sequence([backend.post_processor, template]) if backend.post_processor else template
    backend.encode(_TRIAL)  # some contradictions show only here
    return backend


def _is_hole(token: str, index: int) -> bool:
    match = _HOLE.fullmatch(token)
    return match is not None and int(match[1]) == index


def _split(fields: Fields) -> PreTokenizer:
    name = fields.text("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"{fields.file.path}: the tokenizer splits text by llama.cpp's {name!r:.100}, which decoct does not know (it knows "
            f"{', '.join(PRE_TOKENIZERS)}); {_REMEDY}"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(fields: Fields, split: PreTokenizer, tokens: dict[int, str]) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    merges = [tuple(pair.split(" ")) for pair in fields.items("tokenizer.ggml.merges", str, [])]
    if wrong := next((pair for pair in merges if len(pair) != 2), None):
        raise UserError(f"{fields.file.path}: {' '.join(wrong)!r:.100} among the merges is not two tokens; {_REMEDY}")
    vocabulary = {token: index for index, token in tokens.items()}
    backend: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.whole_words))  # pyright: ignore[reportArgumentType]
    # Qwen composes letters first, which llama.cpp leaves to whoever gives it text
    if fields.text("tokenizer.ggml.pre") in ("qwen2", "deepseek-r1-qwen", "megrez"):
        backend.normalizer = normalizers.NFC()
    parts: list[Any] = []
    for step in split.steps:
        if step == DIGITS:
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != GPT2:
            parts.append(pre_tokenizers.Split(Regex(step), behavior="isolated"))
    # the last step maps bytes to letters; GPT-2's own split is built into it
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.steps[-1] == GPT2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _add_tokens(backend: Any, fields: Fields, tokens: dict[int, str], types: list[int], *, sentencepiece: bool) -> None:
    """Add control tokens as special ones and user-defined tokens as whole ones; ids must come out as in the file."""
    from tokenizers import AddedToken

    prefixed = sentencepiece and fields.flag("tokenizer.ggml.add_space_prefix", True)
    added = []
    for index, token in tokens.items():
        if types[index] == CONTROL or (types[index] == UNKNOWN and sentencepiece):
            added.append(AddedToken(token, normalized=False, special=True))
        elif types[index] == USER_DEFINED:
            # runs of spaces are found after the normalizer has written them as '▁'; a prefix would be added to the token itself
            spaces = sentencepiece and not prefixed and not token.strip("▁")
            added.append(AddedToken(token, normalized=spaces, special=False))
    backend.add_tokens(added)
    if wrong := next((index for index, token in tokens.items() if backend.token_to_id(token) != index), None):
        raise UserError(f"{fields.file.path}: the token {tokens[wrong]!r:.100} would not keep its id {wrong}; {_REMEDY}")


def _around(fields: Fields, tokens: list[str], bos: bool) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """(id, token) of what is put before and after a text."""
    found: list[list[tuple[int, str]]] = []
    for name, default in (("bos", bos), ("eos", False)):
        index: int | None = fields.whole(f"tokenizer.ggml.{name}_token_id", None, least=0)
        # the file's word counts; else the default of the kind, if there is such a token
        wanted = fields.flag(f"tokenizer.ggml.add_{name}_token", default and index is not None)
        if not wanted:
            found.append([])
        elif index is None or index >= len(tokens):
            raise UserError(f"{fields.file.path}: add_{name}_token is true, but {name}_token_id is {index}; {_REMEDY}")
        else:
            found.append([(index, tokens[index])])
    return found[0], found[1]


def _token(fields: Fields, tokens: list[str], key: str) -> str | None:
    index = fields.whole(f"tokenizer.ggml.{key}_token_id", None, least=0)
    return tokens[index] if index is not None and index < len(tokens) else None


def _chat_templates(fields: Fields) -> Any:
    """One template, or several by name; None without."""
    default = fields.text("tokenizer.chat_template", None)
    named = {name: fields.text(f"tokenizer.chat_template.{name}") for name in fields.items("tokenizer.chat_templates", str, [])}
    if not named:
        return default
    return {**({"default": default} if default else {}), **named}
