"""SentencePiece BPE ("llama" in GGUF; Llama 2, Mistral, Gemma, Phi-3) as a BPE model with a list of merges.

SentencePiece merges the neighbours whose merged piece has the best score. A list of all splits of every piece in two, pieces with better
scores first, merges in the same order.

Source: llama.cpp ``llama-vocab.cpp`` (llm_tokenizer_spm); transformers ``tokenization_utils_base.py`` (generate_merges).
"""

import math
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from .fields import Fields

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "▁"
_NORMAL, _UNKNOWN, _USER_DEFINED = 1, 2, 4


def sentencepiece_backend(fields: Fields, tokens: dict[int, str], types: list[int]) -> "Tokenizer":
    """The BPE model with normalizer and decoder; spaces of ``tokens`` become '▁' in place.

    Args:
        fields: The file's metadata.
        tokens: Text by id.
        types: Type of each id.

    Raises:
        UserError: a score is missing or not finite.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = fields.items("tokenizer.ggml.scores", float, None)
    # without scores the order of merging is unknown
    if scores is None or len(scores) != len(types) or not all(map(math.isfinite, scores)):
        raise UserError(f"{fields.file.path}: tokenizer.ggml.scores is not one finite number per token; fetch or convert the file again")
    for index, token in tokens.items():
        # llama.cpp stores user-defined runs of spaces as they are in a text
        if types[index] == _USER_DEFINED and token and not token.strip(" "):
            tokens[index] = SPACE * len(token)
    unknown = fields.whole("tokenizer.ggml.unknown_token_id", None, least=0)
    if unknown is None:
        # a file may name no unknown token; its type shows it
        unknown = next((index for index in tokens if types[index] == _UNKNOWN), None)
    texts = set(tokens.values())
    backend: Any = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in tokens.items()},
            merges=_merges(tokens, types, scores),
            unk_token=tokens.get(unknown) if unknown is not None else None,
            fuse_unk=True,
            # only if all 256 byte tokens are there: otherwise unknown characters become the unknown token
            byte_fallback=all(f"<0x{byte:02X}>" in texts for byte in range(256)),
        )
    )
    prefix = fields.flag("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", SPACE)
    # SentencePiece writes a space before a text, unless the model was trained without
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    # and takes it off again when it decodes
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(content=" ", left=1, right=0)] if prefix else parts)
    return backend


def _merges(tokens: dict[int, str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every split in two of every normal piece into normal pieces, those of pieces with better scores first."""
    pieces = {token: index for index, token in tokens.items() if types[index] == _NORMAL}
    found: list[tuple[str, str]] = []
    # equal scores: the lower id first, as in the file
    for token in sorted(pieces, key=lambda piece: (-scores[pieces[piece]], pieces[piece])):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in pieces and token[cut:] in pieces]
        found += sorted(splits, key=lambda pair: (-len(pair[0]), pieces[pair[0]]))
    return found
