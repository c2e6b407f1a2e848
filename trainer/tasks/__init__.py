"""Scores of a model on tasks: what it can do, beside how near it is to its teacher."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .language_model import LanguageModel as LanguageModel
    from .language_model import LogLikelihood as LogLikelihood
    from .score import TaskScore as TaskScore
    from .scoring import score_tasks as score_tasks

__getattr__, __dir__ = lazy_names(__name__)
