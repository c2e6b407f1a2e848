"""Builds a model on the meta device: every shape and name of a config, without memory for weights."""

from typing import TYPE_CHECKING

from ..common.errors import UserError
from ..common.quiet import quiet_transformers
from .refused_inputs import check_text_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def meta_model(config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model of ``config`` on the meta device: every shape and name, no memory.

    Raises:
        UserError: it is not a text model, or transformers cannot build it.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    check_text_model(config.name_or_path or "the model", config)
    try:
        # every tensor that is made in this block has a shape and no storage; to draw its numbers would take most of the time
        with quiet_transformers(), torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
        # transformers ties weights where it draws them
        model.tie_weights()
        return model
    except Exception as error:
        raise not_loadable(config.model_type, "a causal language model", error) from error


def not_loadable(path: object, what: str, error: Exception) -> UserError:
    """A ``UserError`` with the first line of an error of transformers."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserError(f"{path} cannot be loaded as {what}: {first}")
