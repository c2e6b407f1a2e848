"""Where decoct keeps what it can make again."""

import os
from pathlib import Path

VARIABLE = "DECOCT_CACHE"
"""Environment variable that names the cache folder."""


def cache_folder() -> Path:
    """The cache folder, which may not be there yet: ``$DECOCT_CACHE``, else ``~/.cache/decoct``."""
    return Path(os.environ.get(VARIABLE) or "~/.cache/decoct").expanduser().absolute()
