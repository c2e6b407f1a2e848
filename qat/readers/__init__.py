"""The independent readers of exports, in numpy: every export is checked against them. They import no other part of qat."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .open import ExportReader as ExportReader
    from .open import is_export as is_export
    from .open import open_export as open_export
    from .open import open_folder as open_folder

__getattr__, __dir__ = lazy_names(__name__)
