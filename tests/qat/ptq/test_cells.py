"""Latent weights that begin in given codes."""

import pytest
import torch

from decoct.qat.fake_quant import Encoded, dequantize, quantize_with
from decoct.qat.ptq.cells import into_cells
from decoct.qat.spec import QuantSpec

SPEC = QuantSpec(bits=3, group_size=8)
SPECS = (SPEC, QuantSpec(bits=3, group_size=8, symmetric=False), QuantSpec(bits=3, group_size="tensor"))


def case(spec: QuantSpec) -> tuple[torch.Tensor, Encoded]:
    """Weights, codes that are mostly not the nearest, scales of a quarter, zero points within two of the middle."""
    drawn = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 24, generator=drawn)
    codes = torch.randint(spec.qmin, spec.qmax + 1, (16, 24), generator=drawn, dtype=torch.int8)
    shape = spec.scale_shape(16, 24)
    zeros = None if spec.symmetric else torch.randint(-2, 3, shape, generator=drawn, dtype=torch.int8)
    return weight, Encoded(codes, torch.full(shape, 0.25), zeros)


@pytest.mark.parametrize("spec", SPECS)
def test_they_round_to_the_codes_and_inside_the_limits(spec: QuantSpec) -> None:
    weight, encoded = case(spec)
    latent = into_cells(weight, encoded, spec)
    codes, scales, zeros, _ = encoded
    assert torch.equal(quantize_with(latent, scales, spec, zeros=zeros)[0], codes)
    low, high = (dequantize(torch.full_like(codes, end), scales, zeros) for end in (spec.qmin, spec.qmax))
    assert bool(((latent >= low) & (latent <= high)).all()), "beyond them a weight would get no gradient"


@pytest.mark.parametrize("spec", SPECS)
def test_a_weight_that_lies_in_its_cell_stays_and_others_go_no_farther_than_its_border(spec: QuantSpec) -> None:
    weight, encoded = case(spec)
    codes, scales, zeros, _ = encoded
    nearest = quantize_with(weight, scales, spec, zeros=zeros)[0]
    latent, middle = into_cells(weight, encoded, spec), dequantize(*encoded[:3])
    inside = (codes == nearest) & ((weight - middle).abs() < 0.1)
    inner = (codes > spec.qmin) & (codes < spec.qmax)
    assert (inside & inner).any() and torch.equal(latent[inside & inner], weight[inside & inner])
    off = ((latent - middle) / 0.25).abs()[(codes != nearest) & inner]
    assert torch.allclose(off, torch.full_like(off, 0.48), atol=1e-5)


def test_pruned_weights_stay_zero() -> None:
    weight, encoded = case(SPEC)
    weight[:, ::2], encoded.codes[:, ::2] = 0.0, 0
    assert not into_cells(weight, encoded, SPEC)[:, ::2].any()
