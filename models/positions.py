"""Checks that windows are not longer than a model's table of positions."""

from pathlib import Path
from typing import TYPE_CHECKING

from .common.errors import UserError
from .families import text_config
from .folder.meta import meta_model
from .outline import has_outline

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_positions(path: str | Path, config: "PreTrainedConfig", seq_length: int) -> None:
    """Refuses windows that are longer than a model's table of positions (GPT-2, OPT, GPT-J); rotary models have no table.

    Raises:
        UserError: the windows are too long; the message has both lengths.
    """
    limit = position_limit(config)
    if limit is not None and seq_length > limit:
        raise UserError(
            f"data.seq_length={seq_length} is longer than the {limit:,} positions of {path} (model type {config.model_type!r}), "
            f"whose table of positions ends there; set data.seq_length={limit} or less (--seq-length {limit})"
        )


def position_limit(config: "PreTrainedConfig") -> int | None:
    """The number of positions in a model's table; None if the model computes positions without a table."""
    text = text_config(config)
    # MPT's table has a name of its own
    if text.model_type == "mpt":
        return text.max_seq_len
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    if has_outline(config):
        return None  # all of these families rotate
    from torch import nn

    model = meta_model(config)
    # max_position_embeddings is there for rotary models too, so only a table of positions makes it a limit
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    # names of tables in GPT-2, OPT and BERT-like decoders
    tables = [name for name in tables if name.endswith(("wpe", "embed_positions", "position_embeddings", "embed_position"))]
    # and of tables that are computed, not trained
    tables += [name for name, buffer in model.named_buffers() if name.endswith(("embed_positions", "pos_encoding")) and buffer.ndim > 1]
    return limit if tables else None
