"""What an export format cannot hold of a family, seen from its config and the names of its weights."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ...models.common.errors import UserError
from .gguf.metadata import model_metadata
from .gguf.names import architecture_of, place_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def gguf_refusal(config: "PreTrainedConfig", names: Iterable[str]) -> str | None:
    """Why llama.cpp has no equal of the model; None when it has.

    Args:
        names: Of all its weights.
    """
    try:
        architecture = architecture_of(config.model_type)
        model_metadata(config, architecture)
        for name in names:
            place_of(name, architecture)
    except UserError as error:
        return str(error)
    return None
