"""Whether an output head is the embedding's table, in memory and by the config, which readers of a saved model believe."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_logger = logging.getLogger(__name__)


def settle_ties(path: str | Path, model: "PreTrainedModel") -> None:
    """Make the config of a loaded model say what it is in memory.

    transformers unties a head that the files hold with values of its own, and leaves ``tie_word_embeddings`` as it was.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    one, two = getattr(embedding, "weight", None), getattr(head, "weight", None)
    text: Any = model.config.get_text_config()
    if one is None or two is None or (one is two) == bool(getattr(text, "tie_word_embeddings", False)):
        return
    if one is not two:
        _logger.warning(
            "%s says tie_word_embeddings: true, but holds a head with values of its own, which is what was trained and is kept; what is "
            "saved from here says false",
            path,
        )
    for part in (model.config, text):
        part.tie_word_embeddings = one is two
