"""The processes of a run: ranks and their collective operations, the strategy that shares a student, FSDP2's rows."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .world import World as World
    from .world import current_world as current_world

__getattr__, __dir__ = lazy_names(__name__)
