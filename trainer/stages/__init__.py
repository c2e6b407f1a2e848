"""The stage kinds of a recipe, one file each, and what they share."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .context import StageContext as StageContext
    from .context import StageResult as StageResult
    from .context import Trained as Trained

__getattr__, __dir__ = lazy_names(__name__)
