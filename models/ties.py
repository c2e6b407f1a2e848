"""Whether the output head is tied to the embedding, and a config that states it correctly: readers of a saved model rely on it."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_logger = logging.getLogger(__name__)


def is_tied(model: "PreTrainedModel") -> bool:
    """Whether the output head multiplies by the input embedding's table."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    # ``...`` as the default: a head and an embedding that both lack a weight are not tied
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", ...)


def untie(model: "PreTrainedModel") -> None:
    """Gives a tied output head a copy of the embedding's table, and says so in the config; does nothing where they are not tied."""
    from torch import nn

    if not is_tied(model):
        return
    head: Any = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    live: Any = model
    # transformers' own list of what is written once
    name = next(name for name, module in model.named_modules() if module is head)
    live.all_tied_weights_keys = {key: source for key, source in live.all_tied_weights_keys.items() if key != f"{name}.weight"}
    for part in (model.config, model.config.get_text_config()):
        part.tie_word_embeddings = False


def settle_ties(path: str | Path, model: "PreTrainedModel") -> None:
    """Sets ``tie_word_embeddings`` in the config of a loaded model to what is the case in memory.

    transformers unties a head that has values of its own in the files, but does not change ``tie_word_embeddings``.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    one, two = getattr(embedding, "weight", None), getattr(head, "weight", None)
    text: Any = model.config.get_text_config()
    # nothing to settle: one of the two is missing, or the config says what is so
    if one is None or two is None or (one is two) == bool(getattr(text, "tie_word_embeddings", False)):
        return
    # tied weights in an untied config need no warning: nothing is lost
    if one is not two:
        _logger.warning(
            "%s has tie_word_embeddings: true, but also a head with values of its own; that head is kept, and models saved from here have "
            "tie_word_embeddings: false",
            path,
        )
    # both, because savers read one or the other
    for part in (model.config, text):
        part.tie_word_embeddings = one is two
