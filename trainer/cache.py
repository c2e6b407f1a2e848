"""Where decoct keeps what it can make again: tokenized text and scratch teachers."""

from pathlib import Path

from ..models.common.cache_folder import VARIABLE, cache_folder
from ..models.common.files import check_writable_folder


def cache_dir() -> Path:
    """The cache folder, made if it is missing: ``$DECOCT_CACHE``, else ``~/.cache/decoct``.

    Raises: UserError when it cannot be made or written.
    """
    folder = cache_folder()
    check_writable_folder(folder, f"the cache folder (environment variable {VARIABLE})")
    return folder
