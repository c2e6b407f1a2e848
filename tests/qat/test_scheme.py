"""Which module gets which lattice, from names alone."""

import pytest

from decoct.qat.scheme import QuantScheme, SpecChange
from decoct.qat.spec import QuantSpec

BASE = QuantSpec(bits=4, group_size=32)
NAMES = [f"model.layers.{layer}.{name}" for layer in range(2) for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
SHAPES = dict.fromkeys(NAMES, (64, 64))


def test_patterns_change_what_they_match_and_skip_wins() -> None:
    scheme = QuantScheme(
        weights=BASE,
        skip=("*.0.mlp.*",),
        overrides={"*.down_proj": SpecChange(bits=8), "*.1.self_attn.*": SpecChange(group_size="channel", symmetric=False)},
    )
    found = scheme.of_linears(SHAPES)
    assert found == {
        "model.layers.0.self_attn.q_proj": BASE,
        "model.layers.1.self_attn.q_proj": QuantSpec(bits=4, group_size="channel", symmetric=False),
        "model.layers.1.mlp.up_proj": BASE,
        "model.layers.1.mlp.down_proj": QuantSpec(bits=8, group_size=32),
    }
    assert list(found) == [name for name in NAMES if name in found]


def test_the_order_of_patterns_plays_no_part() -> None:
    changes = {"*.down_proj": SpecChange(bits=8), "*.1.*.down_proj": SpecChange(bits=8), "*.up_proj": SpecChange(bits=3)}
    forward, backward = (QuantScheme(weights=BASE, overrides=dict(items)) for items in (changes.items(), reversed(changes.items())))
    assert forward.of_linears(SHAPES) == backward.of_linears(SHAPES)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"*.gate_proj": SpecChange(bits=8)}, r"overrides: '\*.gate_proj' matches no linear layer that is quantized; .*'\*.q_proj'"),
        ({"*.0.mlp.up_proj": SpecChange(bits=8)}, "matches no linear layer that is quantized"),
        ({"*.down_proj": SpecChange(bits=8), "*.1.*": SpecChange(bits=3)}, r"both match model.layers.1.mlp.down_proj and differ"),
    ],
)
def test_patterns_that_do_nothing_or_disagree_are_errors(overrides: dict[str, SpecChange], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantScheme(weights=BASE, skip=("*.0.mlp.*",), overrides=overrides).of_linears(SHAPES)


def test_changes_that_do_not_go_together_name_their_key() -> None:
    with pytest.raises(ValueError, match=r"^overrides.\*.up_proj: .*has no zero point"):
        QuantScheme(weights=BASE, overrides={"*.up_proj": SpecChange(kind="nf4", symmetric=False)})
    with pytest.raises(ValueError, match=r"^embedding: kind='nf4' has codes of 4 bits, not 8"):
        QuantScheme(weights=BASE, embedding=SpecChange(kind="nf4", bits=8))
    with pytest.raises(ValueError, match=r"^bits=9 must be at least 2 and at most 8"):
        SpecChange(bits=9)
    with pytest.raises(ValueError, match="an empty section changes nothing"):
        SpecChange()


def test_another_kind_brings_its_bits() -> None:
    assert SpecChange(kind="fp8_e4m3", group_size="channel").applied(BASE) == QuantSpec(kind="fp8_e4m3", bits=8, group_size="channel")
    assert SpecChange(kind="nf4").applied(QuantSpec(bits=8, group_size=64)) == QuantSpec(kind="nf4", bits=4, group_size=64)
