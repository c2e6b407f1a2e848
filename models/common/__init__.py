"""Utilities that all other folders use: errors, files, locks, hashes, host memory. They do not depend on models."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .errors import DecoctError as DecoctError
    from .errors import GateFailed as GateFailed
    from .errors import MemoryFullError as MemoryFullError
    from .errors import NonFiniteError as NonFiniteError
    from .errors import UserError as UserError

__getattr__, __dir__ = lazy_names(__name__)
