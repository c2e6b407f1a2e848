"""Figures of a model on held-out text, rows of the report, and gates."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .figures import EvalResult as EvalResult
    from .figures import evaluate_model as evaluate_model

__getattr__, __dir__ = lazy_names(__name__)
