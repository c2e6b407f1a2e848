"""Numbers of a config.json that no model has: refused before anything is built from them.

transformers builds whatever a config asks for, layer by layer: ten million layers take hours, a vocabulary of 2^31 takes all memory, and
both are one damaged digit away. The files say how large the model can be, and are asked first.
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
"""Names that configs have for the number of layers, each built one by one."""
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
"""The largest number that is taken for each field; the largest models of 2026 are far below."""
_POSITIVE = ("hidden_size", "vocab_size", "num_attention_heads", "n_embd", "n_head")
_PRODUCT = 100_000
_REMEDY = "config.json is damaged or of another model; fetch or export the model again"


def check_numbers(fields: Mapping[str, Any], where: object) -> None:
    """Refuse sizes that are not whole numbers in a sensible range, in a config and in the configs inside it.

    Args:
        fields: Content of config.json, or the fields of a recipe's ``student.config``.
        where: What the message names.

    Raises:
        UserError: naming field, value and the largest one that is taken.
    """
    for part in _parts(fields):
        for name, most in MOST.items():
            given = part.get(name)
            for value in given if isinstance(given, list) else (given,):
                least = 1 if name in _POSITIVE else -1
                if isinstance(value, bool) or (isinstance(value, int | float) and not least <= value <= most):
                    raise UserError(
                        f"{where}: {name} is {value!r:.40}; a whole number up to {most:,} is allowed; mend it, or fetch the model again"
                    )
        depth, experts = (max((part[n] for n in names if isinstance(part.get(n), int)), default=0) for names in (DEPTHS, _EXPERTS))
        if depth * experts > _PRODUCT:
            raise UserError(f"{where}: {depth:,} layers of {experts:,} experts are more than {_PRODUCT:,}; {_REMEDY}")


def check_depth(fields: Mapping[str, Any], tensors: int, where: object) -> None:
    """Refuse a config with more layers than there are tensors: every layer has some.

    Args:
        fields: Content of config.json.
        tensors: Number of tensors in the weight files.
        where: What the message names.

    Raises:
        UserError: naming both numbers.
    """
    text = fields.get("text_config")
    for part in (fields, text if isinstance(text, dict) else {}):
        for name in DEPTHS:
            depth = part.get(name)
            if isinstance(depth, int) and depth > tensors:
                raise UserError(f"{where}: {name} is {depth!r:.40}, but the weight files hold {tensors:,} tensors in all; {_REMEDY}")


def check_size(path: object, config: "PreTrainedConfig", files: Sequence[Path]) -> None:
    """Refuse a config whose model is much larger than its weight files: what is missing in them would be made up in memory.

    Args:
        path: What the message names.
        config: Of the model.
        files: Its weight files, already checked.

    Raises:
        UserError: naming both numbers of weights.
    """
    from .meta import meta_model

    held = sum(math.prod(info.shape) for file in files for info in read_header(file).tensors.values())
    wanted = sum(parameter.numel() for parameter in meta_model(config).parameters())
    if wanted > 2 * held + 2**24:
        raise UserError(
            f"the weights in {path} do not fit its config.json, which asks for {wanted:,} of them; the files hold {held:,}; {_REMEDY}"
        )


def _parts(fields: Mapping[str, Any], depth: int = 4) -> Iterator[Mapping[str, Any]]:
    yield fields
    for value in fields.values():
        if isinstance(value, dict) and depth:
            yield from _parts(value, depth - 1)
