"""Sources of an export: a quantized or plain model folder, opened and checked before a weight is written."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .openers import SourceFolder as SourceFolder
    from .plain_source import PlainSource as PlainSource
    from .plain_source import open_plain_source as open_plain_source
    from .quantized_source import ExportSource as ExportSource
    from .quantized_source import open_source as open_source

__getattr__, __dir__ = lazy_names(__name__)
