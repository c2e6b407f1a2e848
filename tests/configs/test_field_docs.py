"""Descriptions of fields are found in every class that settings may inherit from."""

from dataclasses import dataclass

from decoct.configs.field_docs import field_docs


class Plain:
    """A class without a decorator."""

    size: int
    """Bytes of
    a thing."""


@dataclass
class Settings(Plain):
    """A dataclass on it."""

    rate: float = 0.5
    """Share of ``size``."""


def test_a_base_without_a_decorator_is_read() -> None:
    assert field_docs(Settings) == {"size": "Bytes of a thing.", "rate": "Share of `size`."}


def test_a_class_inside_a_function_is_read() -> None:
    class Inner(Settings):
        """Neither decorator nor place at the top."""

        rate: float = 1.0
        """Another share."""

    assert field_docs(Inner) == {"size": "Bytes of a thing.", "rate": "Another share."}
