"""The command line: `decoct VERB ...`, one module for each group of verbs."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .app import main as main

__getattr__, __dir__ = lazy_names(__name__)
