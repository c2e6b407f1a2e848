"""Limits of each export format, checked against a plain description of the model by the exporters and the plan. Needs no torch."""

from typing import TYPE_CHECKING

from .... import lazy_names

if TYPE_CHECKING:
    from .formats import LIMITS as LIMITS
    from .formats import refusals as refusals
    from .refusal import Refusal as Refusal
    from .stored_model import StoredModel as StoredModel
    from .stored_model import StoredModule as StoredModule

__getattr__, __dir__ = lazy_names(__name__)
