"""Checks of an export in installed runtimes (transformers, vLLM, llama.cpp), each in a process of its own."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .check import check_runtimes as check_runtimes

__getattr__, __dir__ = lazy_names(__name__)
