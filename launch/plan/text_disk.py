"""Bytes of tokenized text in the cache folder, an upper bound before anything is read."""

from typing import TYPE_CHECKING

from ...models.common.errors import UserError

if TYPE_CHECKING:
    from ...trainer.settings import DataSettings

TOKEN_BYTES = 4
"""Bytes of a token on disk (int32, ``trainer.data.windows``)."""


def tokenized_bytes(data: "DataSettings") -> int | None:
    """Return the largest size of the tokenized text; it takes twice as much while it is made.

    A tokenizer makes at most about one token of each byte, and mostly one of four. None where that bound says nothing: text from the hub or
    from imported code, conversations (a chat template adds tokens), and files that are compressed.
    """
    from ...trainer.data.documents import STDLIB_BYTES
    from ...trainer.data.input_files import PACKED, find_files

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
