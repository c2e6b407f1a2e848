"""Refuses impossible sizes in a config.json before a model is built from them.

transformers builds whatever a config asks for: ten million layers take hours, a vocabulary of 2^31 takes all memory, and one damaged
digit is enough for both. The weight files limit the size of the model, so they are read first.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from .safetensors_read import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
"""Names of the number of layers in configs. Layers are built one by one."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "moe_num_experts", "num_experts_per_tok")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "head_dim", "num_attention_heads", "num_key_value_heads", "n_head", "num_heads")
_LARGE = ("vocab_size", "intermediate_size", "n_inner", "ffn_dim", "d_ff", "moe_intermediate_size", "type_vocab_size")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "sliding_window")
MOST: dict[str, int] = {
    **dict.fromkeys(DEPTHS, 1_000),
    **dict.fromkeys(_EXPERTS, 10_000),
    **dict.fromkeys(_WIDTHS, 2**20),
    **dict.fromkeys(_LARGE, 2**24),
    **dict.fromkeys(_POSITIONS, 2**31),
}
"""Largest accepted value of each field, far above the largest models of 2026."""
# fields that must be at least 1; others may be 0 or -1 for none
_POSITIVE = ("hidden_size", "vocab_size", "num_attention_heads", "n_embd", "n_head")
# largest number of experts in all layers together: each one is a module that is built
_PRODUCT = 100_000
_REMEDY = "config.json is damaged or of another model; fetch or export the model again"


def check_numbers(fields: Mapping[str, Any], where: object) -> None:
    """Refuse sizes that are out of range, in a config and in its nested configs.

    Args:
        fields: Content of config.json, or the fields of a recipe's ``student.config``.
        where: File or key that the message names.

    Raises:
        UserError: a size is out of range, or no whole number. The message names the field, its value and the largest accepted value.
    """
    for part in _parts(fields):
        for name, most in MOST.items():
            given = part.get(name)
            # some families give a list with one value per layer
            for value in given if isinstance(given, list) else (given,):
                # some configs write -1 or 0 for 'none'
                least = 1 if name in _POSITIVE else -1
                # infinity and NaN are out of every range, so that int() is asked for finite numbers only
                if isinstance(value, bool) or (isinstance(value, int | float) and not (least <= value <= most and value == int(value))):
                    raise UserError(
                        f"{where}: {name} is {value!r:.40}; a whole number up to {most:,} is allowed; mend it, or fetch the model again"
                    )
        # a config has one of the names; the largest counts where it has more
        depth, experts = (max((part[n] for n in names if isinstance(part.get(n), int)), default=0) for names in (DEPTHS, _EXPERTS))
        # layers times experts: each factor may be possible, their product not
        if depth * experts > _PRODUCT:
            raise UserError(f"{where}: {depth:,} layers of {experts:,} experts are more than {_PRODUCT:,}; {_REMEDY}")


def check_depth(fields: Mapping[str, Any], tensors: int, where: object) -> None:
    """Refuse a config with more layers than tensors: every layer has at least one tensor.

    Args:
        fields: Content of config.json.
        tensors: Number of tensors in the weight files.
        where: File that the message names.

    Raises:
        UserError: the message names both numbers.
    """
    text = fields.get("text_config")
    # models of text and images have their depth in a nested config
    for part in (fields, text if isinstance(text, dict) else {}):
        for name in DEPTHS:
            depth = part.get(name)
            if isinstance(depth, int) and depth > tensors:
                raise UserError(f"{where}: {name} is {depth!r:.40}, but the weight files hold {tensors:,} tensors in all; {_REMEDY}")


def check_size(path: object, config: "PreTrainedConfig", files: Sequence[Path]) -> None:
    """Refuse a config whose model is much larger than its weight files: transformers would allocate the missing weights.

    Args:
        path: Folder or hub id that the message names.
        config: Config of the model.
        files: Weight files of the model, already checked.

    Raises:
        UserError: the message names both numbers of weights.
    """
    from .meta import meta_model

    # headers alone: no weight is read
    held = sum(math.prod(info.shape) for file in files for info in read_header(file).tensors.values())
    wanted = sum(parameter.numel() for parameter in meta_model(config).parameters())
    # generous: only a config that is far off is refused here; check_report finds the smaller differences
    if wanted > 2 * held + 2**24:
        raise UserError(
            f"the weights in {path} do not fit its config.json, which asks for {wanted:,} of them; the files hold {held:,}; {_REMEDY}"
        )


def unknown_kind(kind: object) -> str:
    """The refusal of a ``student.config`` whose model type transformers does not have."""
    return f"student.config.model_type={kind!r} is not a causal language model of transformers; use llama, qwen2, qwen3, ..."


def refused_config(error: Exception) -> str:
    """The refusal of a ``student.config`` with a value that transformers refuses, on one line."""
    return f"student.config is refused by transformers: {' '.join(str(error).split())}"


def _parts(fields: Mapping[str, Any], depth: int = 4) -> Iterator[Mapping[str, Any]]:
    yield fields
    for value in fields.values():
        # bounded: a hostile file may nest without end
        if isinstance(value, dict) and depth:
            yield from _parts(value, depth - 1)
