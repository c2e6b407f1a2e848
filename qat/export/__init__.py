"""Exporters: they pack a quantized folder for serving stacks and check the result before it gets its final name."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .export import EXPORTERS as EXPORTERS
    from .export import ExportResult as ExportResult
    from .export import export_folder as export_folder

__getattr__, __dir__ = lazy_names(__name__)
