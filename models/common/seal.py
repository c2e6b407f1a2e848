"""JSON files that can tell that they were damaged: one key holds the sha256 of the rest."""

import json
from collections.abc import Mapping
from typing import Any

from .files import finite, sha256_json

SEAL = "self_sha256"
"""The key: hex sha256 of the canonical JSON of everything beside it."""


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` as JSON gives it back (NaN and infinities become null), with its hash as the last key."""
    own = json.loads(json.dumps(finite({key: value for key, value in content.items() if key != SEAL}), allow_nan=False))
    return {**own, SEAL: sha256_json(own)}


def seal_is_broken(content: Mapping[str, Any]) -> bool:
    """Whether what was read is not what was written. Content without a hash, of earlier versions, is not broken.

    A hash under a damaged name is found too: some other key then holds the hash of the rest.
    """
    names = [SEAL] if SEAL in content else [name for name, value in content.items() if isinstance(value, str) and len(value) == 64]
    try:
        fits = any(sha256_json({k: v for k, v in content.items() if k != name}) == content[name] for name in names)
    except (ValueError, RecursionError):  # NaN, half a character: nothing that was written here
        return SEAL in content
    return fits != (SEAL in content)
