"""Generation settings as GGUF metadata: sampling, and the tokens that end a text.

llama.cpp reads no generation_config.json. Its server and command line use ``general.sampling.*`` as defaults. It ends a text at
``eos_token_id``, ``eot_token_id``, ``eom_token_id`` and at tokens that it knows by their text; there is no key for a list.

Source: gguf-py ``metadata.py``, ``constants.py``; llama.cpp ``common.cpp`` (common_init_sampler_from_model), ``llama-vocab.cpp``.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....models.common.errors import UserError
from ....models.folder.folder_checks import read_json
from .container import F32, I32, Value

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GENERATION = "generation_config.json"
_FLOATS = {"temperature": "temp", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "penalty_repeat"}
_KNOWN_BY_TEXT = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_text|>")
)
"""Texts of tokens at which every llama.cpp since early 2025 ends, whatever the file contains."""
# Besides the end of text: llama.cpp stops at an end of turn (eot) and an end of message (eom) too.
_ENDS = "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"


def sampling_metadata(folder: Path, context: int) -> dict[str, Value]:
    """Return the ``general.sampling.*`` entries for generation_config.json, under the names of llama.cpp's converter.

    Args:
        folder: A model folder; without the file there are no entries.
        context: The model's context in tokens. transformers penalizes the repetition of any earlier token, llama.cpp by default only that
            of the last 64, so the entry names the whole context.

    Raises:
        UserError: a setting is not a number.
    """
    given = _generation(folder)
    found: dict[str, Value] = {}
    for name, key in _FLOATS.items():
        if given.get(name) is not None:
            found[f"general.sampling.{key}"] = F32(_number(folder, name, given[name]))
    if given.get("top_k") is not None:
        found["general.sampling.top_k"] = I32(int(_number(folder, "top_k", given["top_k"], whole=True)))
    # 1 penalizes nothing
    if given.get("repetition_penalty") not in (None, 1, 1.0):
        found["general.sampling.penalty_last_n"] = I32(context)
    return found


def end_tokens(folder: Path, config: "PreTrainedConfig", tokenizer: Mapping[str, Value]) -> dict[str, Value]:
    """Return the entries for tokens that end a text in addition to the tokenizer's own end of text.

    Args:
        folder: A model folder.
        config: The model's transformers config; without generation_config.json its ``eos_token_id`` counts, as in transformers.
        tokenizer: The ``tokenizer.*`` entries.

    Raises:
        UserError: an id without a token, or more ends than the file has keys for.
    """
    given = _generation(folder).get("eos_token_id", getattr(config, "eos_token_id", None))
    ids = [given] if isinstance(given, int) else list(given or [])
    names: Any = tokenizer["tokenizer.ggml.tokens"]
    if wrong := [index for index in ids if not (type(index) is int and 0 <= index < len(names))]:
        raise UserError(f"{folder}: eos_token_id {wrong[0]!r} is not one of the {len(names):,} tokens; correct {GENERATION}")
    # a tokenizer without an end of text takes the first of the model's
    own = tokenizer.get("tokenizer.ggml.eos_token_id")
    first: dict[str, Value] = {}
    if own is None and ids:
        own = ids[0]
        first = {"tokenizer.ggml.eos_token_id": own}
    # ends that the file must name: neither the end of text nor known to llama.cpp by their text
    left = [index for index in dict.fromkeys(ids) if index != own and names[index] not in _KNOWN_BY_TEXT]
    if len(left) > len(_ENDS):
        raise UserError(
            f"{folder}: {GENERATION} ends a text at {len(ids)} tokens; a GGUF file names {1 + len(_ENDS)} beside those that llama.cpp "
            f"knows by their text, and {names[left[-1]]!r} would be lost; leave tokens out of eos_token_id"
        )
    return first | dict(zip(_ENDS, left))


def _generation(folder: Path) -> dict[str, Any]:
    file = folder / GENERATION
    return read_json(file) if file.is_file() else {}


def _number(folder: Path, name: str, value: Any, *, whole: bool = False) -> float:
    # true and false are ints in Python
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not right or (whole and (value != int(value) or abs(value) >= 2**31)):
        what = "a whole number" if whole else "a number"
        raise UserError(f"{folder / GENERATION}: {name} is {value!r}, not {what}; correct or remove it")
    return value
