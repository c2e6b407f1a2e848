"""The settings of widths that are chosen: defaults, and what is refused with its remedy."""

from typing import Any

import pytest

from decoct.qat.auto_weights import Budget, WeightSettings
from decoct.qat.scheme import SpecChange
from decoct.qat.spec import QuantSpec


def test_a_number_of_bits_is_a_plain_spec() -> None:
    plain = WeightSettings(bits=3, group_size=64).settled()
    assert plain == QuantSpec(bits=3, group_size=64) and type(plain) is QuantSpec


def test_defaults_are_written_into_the_settings() -> None:
    made = WeightSettings(bits="auto", budget=3.5, symmetric=False)
    assert made.settled() is made
    assert (made.sensitivity, made.sensitivity_tokens, made.widths) == ("cheap", 16_384, None)
    assert made.candidates == (SpecChange(bits=2), SpecChange(bits=3), SpecChange(bits=4), SpecChange(bits=8), None)
    assert made.base == QuantSpec(bits=8, symmetric=False)
    assert made.limit == Budget(bits=3.5)
    assert WeightSettings(bits="auto", budget="60MB").limit == Budget(bytes=60_000_000)
    assert WeightSettings(bits="auto", budget="1 GiB").limit == Budget(bytes=2**30)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "bits='auto' needs a budget: bits per weight, such as budget=3.5, or bytes, such as budget=60MB"),
        ({"budget": 16}, "budget=16 must be greater than 0 and less than 16"),
        ({"budget": 6e7}, "write bytes with their unit, such as budget=60MB"),
        ({"budget": 1.9}, "budget=1.9 is below 2 bits, the smallest of widths, whose scales are counted too; raise it"),
        ({"budget": 3.5, "widths": (4, 8)}, "budget=3.5 is below 4 bits, the smallest of widths"),
        ({"budget": "60"}, "budget='60' is neither bits per weight, such as 3.5, nor bytes with a unit, such as 60MB"),
        ({"budget": "many"}, "budget='many' is neither"),
        ({"budget": True}, "budget=True is neither"),
        ({"budget": 3.5, "widths": (2, 12)}, "widths=12 cannot be chosen: codes have 2 to 8 bits, and 16 leaves a module alone"),
        ({"budget": 3.5, "widths": (2, 2)}, "names a width twice"),
        ({"budget": 3.5, "widths": (3,)}, r"leaves nothing to choose; give two or more, or that number as bits"),
        ({"bits": 4, "budget": 3.5}, "budget=3.5 has no effect with bits=4; use bits=auto, or leave it out"),
        ({"bits": 4, "sensitivity": "exact"}, "sensitivity=exact has no effect with bits=4"),
        ({"budget": 3.5, "sensitivity": "quick"}, "is not one of cheap, second_order, exact"),
        ({"budget": 3.5, "kind": "nf4"}, "kind='nf4' has codes of 4 bits, not auto; use bits=4"),
    ],
)
def test_what_cannot_be_chosen_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightSettings(**{"bits": "auto", **given})
