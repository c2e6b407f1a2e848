"""What is known of the text before anything is read: an upper bound of its bytes in the cache folder, and the shares of a blend."""

from typing import TYPE_CHECKING

from ...models.common.errors import UserError
from .units import amount

if TYPE_CHECKING:
    from ...trainer.settings import DataSettings

TOKEN_BYTES = 4
"""Bytes of a token on disk (int32, ``trainer.data.windows``)."""


def blend_notes(data: "DataSettings", tokens: int) -> list[str]:
    """Return a sentence with what a stage of so many training tokens reads of each text of a blend; [] for one text."""
    from ...trainer.settings_text import labels_of, token_shares

    if not data.blend:
        return []
    shares = zip(labels_of(data.blend), token_shares(data.blend))
    return [f"text: {', '.join(f'{float(share):.1%} {name} ({amount(round(tokens * share))} tokens)' for name, share in shares)}"]


def tokenized_bytes(data: "DataSettings") -> int | None:
    """Return the largest size of the tokenized text; it takes twice as much while it is made.

    A tokenizer makes at most about one token of each byte, and mostly one of four. None where that bound says nothing: text from the hub or
    from imported code, conversations (a chat template adds tokens), and files that are compressed.
    """
    from ...trainer.data.documents import STDLIB_BYTES
    from ...trainer.data.input_files import PACKED, find_files

    if data.blend:
        # each part is an entry of its own
        found = [tokenized_bytes(text) for text in data.texts.values()]
        return None if None in found else sum(part for part in found if part is not None)
    # a text that a model writes is as long as the recipe says
    if data.generate:
        return TOKEN_BYTES * data.generate.tokens
    if data.kind == "chat" or data.hub or data.source:
        return None
    if data.builtin:
        # its bytes are bounded, and so are its tokens
        return TOKEN_BYTES * STDLIB_BYTES
    try:
        files = find_files(data.files or ())
        # how much is in a compressed file is known only when it is read
        if any(file.suffix.lower() in (*PACKED, ".parquet") for file in files):
            return None
        return TOKEN_BYTES * sum(file.stat().st_size for file in files)
    except (UserError, OSError):
        return None  # the run reads the files itself, and reports what is wrong with them
