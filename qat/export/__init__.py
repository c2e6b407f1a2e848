"""Exporters: a quantized folder becomes a packed one that serving stacks load, checked before it appears under its name."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .export import EXPORTERS as EXPORTERS
    from .export import ExportResult as ExportResult
    from .export import export_folder as export_folder

__getattr__, __dir__ = lazy_names(__name__)
