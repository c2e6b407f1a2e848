"""Verifies that an export is still the measured model: hashes, structure, every weight, and the results of runtimes."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .verify import VerifyReport as VerifyReport
    from .verify import verify_folder as verify_folder

__getattr__, __dir__ = lazy_names(__name__)
