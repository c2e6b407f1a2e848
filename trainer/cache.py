"""Where decoct keeps what it can make again: tokenized text and scratch teachers."""

import os
from pathlib import Path

from ..models.files import check_writable_folder

VARIABLE = "DECOCT_CACHE"
"""Environment variable that names the cache folder."""


def cache_dir() -> Path:
    """The cache folder, made if it is missing: ``$DECOCT_CACHE``, else ``~/.cache/decoct``.

    Raises: UserError when it cannot be made or written.
    """
    folder = Path(os.environ.get(VARIABLE) or "~/.cache/decoct").expanduser().absolute()
    check_writable_folder(folder, f"the cache folder (environment variable {VARIABLE})")
    return folder
