"""Ranges of the loss settings."""

from typing import Any

import pytest

from decoct.losses.settings import LossSettings


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", 0.0), ("temperature", -1.0), ("hard_weight", 1.5), ("hard_weight", -0.1), ("beta", 0.0), ("beta", 1.0)],
)
def test_values_out_of_range_are_named(key: str, value: float) -> None:
    given: dict[str, Any] = {key: value}
    with pytest.raises(ValueError, match=f"{key}={value}"):
        LossSettings(**given)


def test_nan_is_refused() -> None:
    for key in ("temperature", "hard_weight", "beta"):
        given: dict[str, Any] = {key: float("nan")}
        with pytest.raises(ValueError, match=f"{key}=nan"):
            LossSettings(**given)
