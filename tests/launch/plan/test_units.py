"""Numbers as readers see them."""

import pytest

from decoct.launch.plan.units import shown_value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1e-4 / 10, "1e-05"),
        (0.1 + 0.2, "0.3"),
        (9.999999999999999e-06, "1e-05"),
        (2e-3, "0.002"),
        (65_536, "65536"),
        (True, "True"),
        ((0.9, 0.1 + 0.2), "[0.9, 0.3]"),
        ("channel", "channel"),
    ],
)
def test_a_value_is_shown_without_the_noise_of_floats(value: object, shown: str) -> None:
    assert shown_value(value) == shown
