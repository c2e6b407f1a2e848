"""Tokenizers: training, checks of tokenizer files, chat templates, and the real vocabulary."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .scratch_tokenizer import train_tokenizer as train_tokenizer
    from .vocabulary import check_same_vocabulary as check_same_vocabulary
    from .vocabulary import effective_vocab as effective_vocab

__getattr__, __dir__ = lazy_names(__name__)
