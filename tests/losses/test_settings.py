"""Ranges of the loss settings, what is filled in, and what has no effect."""

from dataclasses import asdict
from typing import Any

import pytest

from decoct.losses.settings import DIVERGENCES, LossSettings


@pytest.mark.parametrize(
    ("divergence", "key", "value"),
    [
        ("forward_kl", "temperature", 0.0),
        ("forward_kl", "temperature", -1.0),
        ("forward_kl", "temperature", float("nan")),
        ("forward_kl", "hard_weight", 1.5),
        ("forward_kl", "hard_weight", -0.1),
        ("forward_kl", "hard_weight", float("nan")),
        ("jsd", "beta", 0.0),
        ("gkd_jsd", "beta", 0.0),
        ("gkd_jsd", "beta", 1.0),
        ("jsd", "beta", float("nan")),
        ("skew_forward_kl", "alpha", 0.0),
        ("skew_reverse_kl", "alpha", 1.0),
        ("symmetric_kl", "balance", 1.0),
        ("adaptive_kl", "head_mass", 0.0),
    ],
)
def test_values_out_of_range_are_named(divergence: Any, key: str, value: float) -> None:
    given: dict[str, Any] = {key: value}
    with pytest.raises(ValueError, match=f"{key}={value}"):
        LossSettings(divergence=divergence, **given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"beta": 0.5}, "beta=0.5 has no effect: it belongs to jsd and gkd_jsd, and divergence is forward_kl"),
        ({"divergence": "jsd", "alpha": 0.1}, "alpha=0.1 has no effect: it belongs to skew_forward_kl and skew_reverse_kl"),
        ({"divergence": "reverse_kl", "balance": 0.5}, "balance=0.5 has no effect"),
        ({"divergence": "reverse_kl", "head_mass": 0.5}, "head_mass=0.5 has no effect"),
        ({"hard_weight": 1.0, "temperature": 2.0}, "temperature=2.0 has no effect"),
        ({"divergence": "kl"}, "divergence='kl' is not one of forward_kl, reverse_kl"),
    ],
)
def test_what_would_do_nothing_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LossSettings(**given)


def test_what_is_not_given_is_filled_in_and_can_be_read_again() -> None:
    """A resolved recipe names every number, and is a recipe itself."""
    for divergence in DIVERGENCES:
        for hard in (0.0, 1.0):
            made = LossSettings(divergence=divergence, hard_weight=hard)
            assert LossSettings(**asdict(made)) == made
    assert LossSettings(divergence="jsd").beta == 0.5
    assert LossSettings(divergence="skew_reverse_kl").alpha == 0.1
    assert LossSettings().temperature == 1.0
    assert LossSettings(hard_weight=1.0).temperature is None


def test_scale_is_the_weight_times_t_squared() -> None:
    assert LossSettings(temperature=3.0, hard_weight=0.25).scale == 0.75 * 9
    assert LossSettings(temperature=3.0, hard_weight=0.25, t_squared=False).scale == 0.75
    assert LossSettings(hard_weight=1.0).scale == 0
