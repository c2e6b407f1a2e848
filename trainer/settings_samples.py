"""Settings of training text that a model writes while a stage trains (``samples``): on-policy and sequence-level distillation."""

from dataclasses import dataclass
from typing import Annotated, Literal

from .. import Bounds, Count, check_fields


@dataclass(frozen=True, kw_only=True)
class SamplesSettings:
    """Train on completions that a model draws for the beginnings of the text, with the loss on the completions alone.

    Source: GKD (arXiv 2306.13649, algorithm 1); for ``from: teacher`` sequence-level distillation (arXiv 1606.07947, section 3.2).
    """

    from_: Literal["student", "teacher", "mix"] = "student"
    """Model that writes: student = the student as it is at the last refresh (on-policy); teacher = the model that the stage learns from,
    once for each window; mix = each window is written by one of the two, half of the windows by each."""
    share: Annotated[float, Bounds(ge=0, le=1, why="it is a share of the windows")] = 0.5
    """Share of the windows of the stage that hold samples; the others hold the given text."""
    prompts: Count = 32
    """text: tokens of a beginning that is continued. In conversations the prompt is all that stands before the assistant's first answer."""
    max_new_tokens: Count = 128
    """Longest completion in tokens, its end token included. A longer one is cut, and its end is not taught."""
    temperature: Annotated[float, Bounds(gt=0, le=10)] = 1.0
    """Temperature of the sampling; 1 = the model's own distribution."""
    refresh: Count = 1
    """Optimizer steps for which the student writes at a time; 1 = every step trains on samples of the weights that it changes."""
    batch: Count = 64
    """Completions drawn at a time on each process. It changes speed and memory alone."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def by_student(self) -> bool:
        """Whether the student writes some of the samples."""
        return self.from_ != "teacher"

    @property
    def by_teacher(self) -> bool:
        """Whether the teacher writes some of the samples."""
        return self.from_ != "student"

    def per_window(self, seq_length: int, *, packed: bool) -> int:
        """Completions that a window of text holds. With conversations, whose prompts differ in length, it holds as many as fit."""
        return max(1, seq_length // (self.prompts + self.max_new_tokens)) if packed else 1
