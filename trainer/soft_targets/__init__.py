"""Soft targets: a few probabilities per token, from a cache of a teacher's predictions or from a teacher on a server."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .cached import CachedStates as CachedStates
    from .cached import CachedTeacher as CachedTeacher
    from .cached import SparseTeacher as SparseTeacher
    from .served import ServedTeacher as ServedTeacher
    from .store import Store as Store
    from .store import open_store as open_store

__getattr__, __dir__ = lazy_names(__name__)
