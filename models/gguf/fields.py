"""Typed access to the metadata of a GGUF file. Every error names the key, its value and what was expected."""

import math
from typing import Any

from ..common.errors import UserError
from .container import GgufFile

_REQUIRED: Any = object()


class Fields:
    """The metadata of a file; a key that begins with a dot belongs to the file's architecture (``.block_count``)."""

    def __init__(self, file: GgufFile) -> None:
        """Raises UserError if the file does not name its architecture."""
        self.file = file
        # a first value, because ``text`` looks a key up by it
        self.architecture = "general"
        self.architecture = self.text("general.architecture")

    def whole(self, key: str, default: Any = _REQUIRED, *, least: int = 1) -> Any:
        """A whole number of at least ``least``."""
        value = self.get(key, default)
        if value is default and default is not _REQUIRED:
            return default
        if isinstance(value, list):
            # some converters write one number per layer where all are the same
            if not value or any(one != value[0] for one in value):
                raise self.error(key, value, "one number for all layers")
            value = value[0]
        # type, not isinstance: true is an int in Python
        if type(value) is not int or not least <= value < 2**40:
            raise self.error(key, value, f"a whole number from {least}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, *, above: float = 0.0) -> Any:
        """A finite number greater than ``above``, as the shortest decimal that is the same fp32 number."""
        value = self.get(key, default)
        if value is default and default is not _REQUIRED:
            return default
        # written so that NaN is refused
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not value > above:
            raise self.error(key, value, f"a number above {above:g}")
        return shortest(float(value))

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        """A string."""
        value = self.get(key, default)
        if value is not default and not isinstance(value, str):
            raise self.error(key, value, "text")
        return value

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        """True or False."""
        value = self.get(key, default)
        if value is not default and not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def items(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """A list whose elements are all of ``kind``."""
        value = self.get(key, default)
        if value is default and default is not _REQUIRED:
            return default
        if not isinstance(value, list) or not all(type(one) is kind for one in value):
            raise self.error(key, value, f"a list of {kind.__name__}")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key as it is stored; UserError if it is missing and has no default."""
        name = f"{self.architecture}{key}" if key.startswith(".") else key
        if name not in self.file.metadata:
            if default is _REQUIRED:
                raise UserError(f"{self.file.path}: the metadata key {name} is missing; the file is no complete model")
            return default
        return self.file.metadata[name]

    def error(self, key: str, value: Any, expected: str) -> UserError:
        """The refusal of a value."""
        name = f"{self.architecture}{key}" if key.startswith(".") else key
        return UserError(f"{self.file.path}: {name} is {value!r:.100}; expected {expected}. Fetch or convert the file again")


def shortest(value: float) -> float:
    """The shortest decimal whose fp32 is ``value``: 1e-06 and not 9.999999974752427e-07, which is that fp32 in fp64."""
    import numpy as np

    single = np.float32(value)
    return float(str(single)) if float(single) == value else value
