"""Seals JSON content so that damage is detected: one key holds the sha256 of the rest."""

import json
from collections.abc import Mapping
from typing import Any

from .files import finite, sha256_json

SEAL = "self_sha256"
"""The key of the seal: hex sha256 of the canonical JSON of everything else."""


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` as it is after writing and reading JSON (NaN and infinities become null), with its hash as the last key."""
    # through JSON, so that the hash is of what a reader gets back: tuples become lists, keys become strings
    own = json.loads(json.dumps(finite({key: value for key, value in content.items() if key != SEAL}), allow_nan=False))
    return {**own, SEAL: sha256_json(own)}


def seal_is_broken(content: Mapping[str, Any]) -> bool:
    """Whether content that was read differs from what was written. Content of earlier versions, without a hash, is not broken.

    A damaged name of the key is detected too: then another key holds the hash of the rest.
    """
    # without the key, any text of the length of a hash may be the seal under a damaged name
    names = [SEAL] if SEAL in content else [name for name, value in content.items() if isinstance(value, str) and len(value) == 64]
    try:
        fits = any(sha256_json({k: v for k, v in content.items() if k != name}) == content[name] for name in names)
    except (ValueError, RecursionError):
        # NaN or half a surrogate pair, which ``sealed`` never writes
        return SEAL in content
    # broken: a key that does not fit, or a fitting hash under another key
    return fits != (SEAL in content)
