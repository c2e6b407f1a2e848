"""Checkpoints of a training stage: committed by one rename, verified by hash before they are read."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .read import find_newest_verified as find_newest_verified
    from .read import open_checkpoint as open_checkpoint
    from .write import save_checkpoint as save_checkpoint

__getattr__, __dir__ = lazy_names(__name__)
