"""QuantSpec: what it refuses, its numbers, and a JSON form that lasts."""

import json
from dataclasses import replace
from typing import Any

import pytest

from decoct.qat.spec import SCALE_GRIDS, ActivationSpec, QuantSpec


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bits": 1}, "bits=1 must be at least 2 and at most 8"),
        ({"bits": 9}, "bits=9 must be at least 2 and at most 8"),
        ({"bits": True}, "bits=True is not a whole number"),
        ({"bits": 4.0}, "bits=4.0 is not a whole number"),
        ({"bits": "4"}, "bits='4' is not a whole number"),
        ({"bits": None}, "bits=None is not a whole number"),
        ({"group_size": 0}, "group_size=0 must be at least 1"),
        ({"group_size": -1}, "group_size=-1 must be at least 1"),
        ({"group_size": True}, "group_size=True is neither a whole number nor one of channel, tensor"),
        ({"group_size": 64.0}, "group_size=64.0 is neither"),
        ({"group_size": "row"}, "group_size='row' is neither"),
        ({"group_size": None}, "group_size=None is neither"),
        ({"symmetric": 1}, "symmetric=1 is not a truth value"),
        ({"kind": "int4"}, "kind='int4' is not one of int, nf4, fp8_e4m3, mxfp4, nvfp4"),
        ({"symmetric": False, "divisor": "qmax"}, "divisor='qmax' has no effect with symmetric=false"),
        ({"kind": "nf4", "bits": 8}, "kind='nf4' has codes of 4 bits, not 8; use bits=4"),
        ({"kind": "fp8_e4m3", "group_size": "channel"}, "kind='fp8_e4m3' has codes of 8 bits, not 4; use bits=8"),
        ({"kind": "fp8_e4m3", "bits": 8}, "kind='fp8_e4m3' does not take group_size=128; use group_size='tensor' or 'channel'"),
        ({"kind": "mxfp4"}, "kind='mxfp4' does not take group_size=128; use group_size=32"),
        ({"kind": "nvfp4", "group_size": 32}, "kind='nvfp4' does not take group_size=32; use group_size=16"),
        ({"kind": "nf4", "symmetric": False}, "kind='nf4' has no zero point; leave symmetric out"),
        ({"kind": "nf4", "divisor": "qmax"}, "divisor='qmax' has no effect with kind='nf4'"),
        ({"kind": "mxfp4", "group_size": 32, "scale_grid": "bf16"}, "scale_grid='bf16' has no effect with kind='mxfp4'"),
        ({"divisor": "absmax"}, "divisor='absmax' is not one of half_range, qmax, full_range"),
        ({"divisor": 7.5}, "divisor=7.5 is not one of"),
        ({"scale_grid": "fp8"}, "scale_grid='fp8' is not one of bf16_fp16, bf16, fp16, fp32"),
    ],
)
def test_bad_values_are_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="^" + words.replace("(", r"\(").replace(".", r"\.")):
        QuantSpec(**given)


@pytest.mark.parametrize(("bits", "qmin", "qmax", "half"), [(2, -2, 1, 1.5), (3, -4, 3, 3.5), (4, -8, 7, 7.5), (8, -128, 127, 127.5)])
def test_range_and_divisors(bits: int, qmin: int, qmax: int, half: float) -> None:
    spec = QuantSpec(bits=bits)
    assert (spec.qmin, spec.qmax, spec.divisor_value) == (qmin, qmax, half)
    assert replace(spec, divisor="qmax").divisor_value == qmax
    assert replace(spec, divisor="full_range").divisor_value == -qmin


def test_group_width_divides_or_says_what_would() -> None:
    assert QuantSpec(group_size=32).group_width(96) == 32
    assert QuantSpec(group_size="channel").group_width(97) == 97
    with pytest.raises(ValueError, match=r"group_size=128 does not divide in_features=96; use 32 or 16, or skip the module"):
        QuantSpec(group_size=128).group_width(96)
    with pytest.raises(ValueError, match="use 'channel'"):
        QuantSpec(group_size=32).group_width(33)


def test_shape_of_scales() -> None:
    assert QuantSpec(group_size=32).scale_shape(5, 96) == (5, 3)
    assert QuantSpec(group_size="channel").scale_shape(5, 97) == (5, 1)
    assert QuantSpec(group_size="tensor").scale_shape(5, 97) == (1, 1)
    with pytest.raises(ValueError, match="does not divide in_features=97"):
        QuantSpec(group_size=32).scale_shape(5, 97)


def test_divisors_of_other_lattices() -> None:
    assert QuantSpec(bits=4, symmetric=False).divisor_value == 15
    assert QuantSpec(kind="nf4").divisor_value == 1
    assert QuantSpec(kind="fp8_e4m3", bits=8, group_size="channel").divisor_value == 448


def test_json_form_and_hash_are_stable() -> None:
    spec = QuantSpec(bits=4, group_size=64)
    assert json.dumps(spec.to_json()) == (
        '{"bits": 4, "divisor": "half_range", "group_size": 64, "scale_grid": "bf16_fp16", "symmetric": true}'
    )
    # a change here changes the stage key of every quantized folder in the world
    assert spec.hash() == "8e230e8c4978cad8d3f8fe487395e5147d08fea4e63c20c49ff039d67d306a8b"
    assert QuantSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert replace(spec, bits=8).hash() != spec.hash()
    other = QuantSpec(kind="mxfp4", group_size=32)
    assert other.to_json()["kind"] == "mxfp4"
    assert QuantSpec.from_json(json.loads(json.dumps(other.to_json()))) == other
    with pytest.raises(TypeError, match="zero_point"):
        QuantSpec.from_json({"bits": 4, "zero_point": 8})


def test_limits_are_on_their_grid() -> None:
    import torch

    dtypes = {"bf16_fp16": (torch.bfloat16, torch.float16), "bf16": (torch.bfloat16,), "fp16": (torch.float16,), "fp32": (torch.float32,)}
    assert set(SCALE_GRIDS) == set(dtypes)
    for name, grid in SCALE_GRIDS.items():
        for limit in (grid.smallest, grid.largest):
            for dtype in dtypes[name]:
                assert torch.tensor(limit, dtype=torch.float64).to(dtype).item() == limit, (name, limit, dtype)


def test_default_grid_is_exact_in_bf16_and_fp16() -> None:
    import torch

    grid = SCALE_GRIDS["bf16_fp16"]
    every = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16).float()
    inside = every[(every >= grid.smallest) & (every <= grid.largest)]
    assert len(inside) > 4000
    assert torch.equal(inside.half().float(), inside)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "int4"}, "kind='int4' is not one of int8, fp8_e4m3"),
        ({"scaling": "ema"}, "scaling='ema' is not one of dynamic, static"),
        ({"symmetric": 0}, "symmetric=0 is not a truth value"),
        ({"kind": "fp8_e4m3", "symmetric": False}, "kind='fp8_e4m3' has no zero point; leave symmetric out"),
        ({"outliers": 0}, "outliers=0 .*nothing is rounded; 6 is usual"),
        (
            {"outliers": 6.0, "scaling": "static"},
            "outliers=6 stay beside symmetric int8 codes with one scale per token; leave outliers out",
        ),
    ],
)
def test_bad_values_of_activations_are_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="^" + words):
        ActivationSpec(**given)


def test_activations_have_a_json_form_and_a_lattice() -> None:
    spec = ActivationSpec(scaling="static", symmetric=False)
    assert json.dumps(spec.to_json()) == '{"kind": "int8", "scaling": "static", "symmetric": false}'
    assert ActivationSpec.from_json(spec.to_json()) == spec
    assert spec.matrix_spec == QuantSpec(bits=8, group_size="tensor", symmetric=False, scale_grid="fp32")
    assert ActivationSpec().matrix_spec.divisor_value == 127


def test_outliers_are_recorded_only_where_they_are_kept() -> None:
    spec = ActivationSpec(outliers=6.0)
    assert "outliers" not in ActivationSpec().to_json()
    assert ActivationSpec.from_json(spec.to_json()) == spec
    assert (spec.observes, ActivationSpec().observes, spec.of_the_others) == (True, False, ActivationSpec())


def test_a_lattice_has_words() -> None:
    assert QuantSpec(bits=4, group_size=64).words() == "4 bits in groups of 64"
    assert QuantSpec(bits=8, group_size="channel", symmetric=False).words() == "8 bits with one scale per row, with zero points"
    assert QuantSpec(kind="nf4", group_size="tensor").words() == "nf4 with one scale"
