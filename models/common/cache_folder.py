"""The cache folder, which holds only what decoct can make again: tokenized text, scratch teachers, scores, predictions, hashes."""

import os
from pathlib import Path

from .files import check_writable_folder

VARIABLE = "DECOCT_CACHE"
"""Environment variable that names the cache folder."""


def cache_folder() -> Path:
    """The cache folder, which may not exist yet: ``$DECOCT_CACHE``, else ``~/.cache/decoct``."""
    # an empty variable counts as not set
    return Path(os.environ.get(VARIABLE) or "~/.cache/decoct").expanduser().absolute()


def cache_dir() -> Path:
    """The cache folder, created if it is missing.

    Raises:
        UserError: it cannot be created or written.
    """
    folder = cache_folder()
    check_writable_folder(folder, f"the cache folder (environment variable {VARIABLE})")
    return folder
