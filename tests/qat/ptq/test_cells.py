"""Latent weights that begin in given codes."""

import torch

from decoct.qat.fake_quant import quantize_with
from decoct.qat.ptq.cells import into_cells
from decoct.qat.spec import QuantSpec

SPEC = QuantSpec(bits=3, group_size=8)


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, codes that are mostly not the nearest, scales on the grid."""
    drawn = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 24, generator=drawn)
    codes = torch.randint(SPEC.qmin, SPEC.qmax + 1, (16, 24), generator=drawn, dtype=torch.int8)
    return weight, codes, torch.full((16, 3), 0.25)


def test_they_round_to_the_codes_and_inside_the_limits() -> None:
    weight, codes, scales = case()
    latent = into_cells(weight, codes, scales, SPEC)
    assert torch.equal(quantize_with(latent, scales, SPEC)[0], codes)
    assert bool(((latent >= SPEC.qmin * 0.25) & (latent <= SPEC.qmax * 0.25)).all()), "beyond them a weight would get no gradient"


def test_a_weight_that_lies_in_its_cell_stays_and_others_go_no_farther_than_its_border() -> None:
    weight, codes, scales = case()
    nearest = quantize_with(weight, scales, SPEC)[0]
    latent = into_cells(weight, codes, scales, SPEC)
    inside = (codes == nearest) & ((weight / 0.25 - codes).abs() < 0.4)
    inner = (codes > SPEC.qmin) & (codes < SPEC.qmax)
    assert (inside & inner).any() and torch.equal(latent[inside & inner], weight[inside & inner])
    off = (latent / 0.25 - codes).abs()[(codes != nearest) & inner]
    assert torch.allclose(off, torch.full_like(off, 0.48), atol=1e-5)


def test_pruned_weights_stay_zero() -> None:
    weight, codes, scales = case()
    weight[:, ::2], codes[:, ::2] = 0.0, 0
    assert not into_cells(weight, codes, scales, SPEC)[:, ::2].any()
