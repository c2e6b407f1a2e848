"""Settings of text that a model of the recipe writes itself (``data.generate``)."""

from dataclasses import dataclass
from typing import Annotated, Literal

from .. import Bounds, Count, check_fields


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """Text that a model of the recipe writes, for runs without text of their own. It is written once and cached by content.

    Source: data-free distillation of LLM-QAT (arXiv 2305.17888, section 3.1); for chat models Magpie (arXiv 2406.08464, section 2), in
    which the model writes the user's message, too.
    """

    tokens: Count
    """Tokens to write; the last batch is kept whole, so that there may be some more."""
    model: Literal["teacher", "student"] = "teacher"
    """Model that writes: the recipe's teacher, or the student given by student.path."""
    start: Literal["auto", "chat", "text"] = "auto"
    """chat = the model writes a user's message, then its answer, in its chat template; text = it writes documents from their beginning;
    auto = chat if the tokenizer has a chat template."""
    document_tokens: Annotated[int, Bounds(ge=8, le=1_000_000)] = 512
    """Longest document, or longest answer, in tokens. Longer ones are cut."""
    temperature: Annotated[float, Bounds(gt=0, le=10)] = 1.0
    """Temperature of the sampling; 1 = the model's own distribution."""
    top_p: Annotated[float, Bounds(gt=0, le=1)] = 1.0
    """Each token is drawn from the likeliest tokens that hold this share of the probability."""
    batch: Annotated[int, Bounds(ge=1, le=4096)] = 32
    """Documents written at a time. It decides the text, as the seed does."""

    def __post_init__(self) -> None:
        check_fields(self)
