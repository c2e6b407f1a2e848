"""Scales fitted to codes: against a plain fp64 solver, and what they do for GPTQ."""

import pytest
import torch
from torch import Tensor

from decoct.models.calibration.factor import Factor, factorize
from decoct.qat.fake_quant import dequantize, quantize
from decoct.qat.ptq import scale_fit as fit
from decoct.qat.ptq.gptq import gptq_codes, gptq_pass
from decoct.qat.ptq.mse import FITTED_FACTORS, SearchedScales, searched_grid
from decoct.qat.ptq.scale_fit import fitted_codes, fitted_scales
from decoct.qat.spec import QuantSpec

from .test_gptq import case, output_error


def slow_scales(weight: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    """Row by row in fp64: least squares over the columns that a unit of each scale adds, in the metric of H, held to the scales before."""
    groups = scales.shape[1]
    width = weight.shape[1] // groups
    root = torch.linalg.cholesky(hessian.double()).T
    rows = []
    for w, q, s in zip(weight.double(), codes.double(), scales.double()):
        columns = torch.zeros(len(q), groups, dtype=torch.float64)
        for group in range(groups):
            columns[group * width : (group + 1) * width, group] = q[group * width : (group + 1) * width]
        seen = root @ columns
        hold = torch.diag(0.1 * seen.norm(dim=0))  # squared: a hundredth of each group's own curvature
        rows.append(torch.linalg.lstsq(torch.cat([seen, hold]), torch.cat([root @ w, hold @ s])).solution)
    return torch.stack(rows)


def fitted(weight: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor, spec: QuantSpec) -> Tensor:
    """``fitted_scales`` given the pull, which GPTQ leaves behind."""
    return fitted_scales(codes.T, scales, hessian @ (weight - dequantize(codes, scales)).T, hessian, spec)[0]


def factor_of(hessian: Tensor, damping: float) -> Factor:
    factor = factorize(hessian, damping)
    assert factor is not None
    return factor


@pytest.mark.parametrize(("rows", "columns", "bits", "group"), [(9, 192, 3, 64), (4, 96, 2, 16), (3, 33, 4, 11), (2, 8, 8, "channel")])
def test_they_solve_the_least_squares_problem(rows: int, columns: int, bits: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = case(rows, columns)
    spec = QuantSpec(bits=bits, group_size=group, scale_grid="fp32")
    codes, scales = quantize(weight, spec)
    expected = slow_scales(weight, codes, scales, hessian)
    got = fitted(weight, codes, scales, hessian, spec)
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=0)
    assert output_error(codes, got, weight, hessian) < output_error(codes, scales, weight, hessian)
    monkeypatch.setattr(fit, "_PIECE", 1)  # a row at a time
    torch.testing.assert_close(fitted(weight, codes, scales, hessian, spec), got)


def test_groups_without_codes_and_wild_answers_keep_their_scales() -> None:
    weight, hessian = case(6, 128)
    weight[2, 32:64] = 0
    weight[4] = 0
    spec = QuantSpec(bits=4, group_size=32)
    codes, scales = quantize(weight, spec)
    got = fitted(weight, codes, scales, hessian, spec)
    assert got[2, 1] == 1 and (got[4] == 1).all() and (got > 0).all()
    flipped = codes.clone()
    flipped[0, :32] = -codes[0, :32]  # the best scale of these is negative
    assert fitted(weight, flipped, scales, hessian, spec)[0, 0] == scales[0, 0]
    broken = torch.full_like(hessian, torch.nan)
    assert torch.equal(fitted(weight, codes, scales, broken, spec), scales)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.95), (3, 0.95), (4, 0.99), (8, 1.0)])
def test_no_row_gets_worse_and_together_they_get_better(bits: int, share: float) -> None:
    weight, hessian = case(48, 256)
    spec = QuantSpec(bits=bits, group_size=64)
    scales = searched_grid(weight, spec, None, hessian.diagonal()).scales
    factor = factorize(hessian)
    assert factor is not None
    plain = gptq_codes(weight, scales, factor, spec)
    codes, fitted = fitted_codes(weight, SearchedScales(scales, None), hessian, factor, spec)
    assert torch.equal(fitted, fitted.to(torch.bfloat16).float())
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(256)

    def row_errors(codes: Tensor, scales: Tensor) -> Tensor:
        off = dequantize(codes, scales).double() - weight.double()
        return ((off @ damped.double()) * off).sum(1)

    before, after = row_errors(plain, scales), row_errors(codes, fitted)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() <= share * before.sum()  # 8-bit codes fit scales on the bf16 grid too closely to gain


@pytest.mark.parametrize("zeros", [None, torch.tensor([[3]], dtype=torch.int8)], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("shared", [False, True], ids=["groups", "one scale"])
def test_the_gain_is_what_the_damped_error_loses(shared: bool, zeros: Tensor | None) -> None:
    weight, hessian = case(21, 128)
    spec = QuantSpec(bits=3, group_size="tensor" if shared else 32, symmetric=zeros is None, scale_grid="bf16_fp16")
    scales = quantize(weight, QuantSpec(bits=3, group_size=spec.group_size))[1]
    points = None if zeros is None else zeros.expand(scales.shape).contiguous()
    codes = gptq_pass(weight, scales, factor_of(hessian, 0.0), spec, None, points).codes
    damped = hessian + 0.3 * torch.eye(128)
    pull = damped @ (weight - dequantize(codes, scales, points)).T
    got, gain = fitted_scales(codes.T, scales, pull, hessian, spec, 0.3, points)

    def errors(held: Tensor) -> Tensor:
        off = dequantize(codes, held, points).double() - weight.double()
        return ((off @ damped.double()) * off).sum(1)

    lost = errors(scales) - errors(got)
    torch.testing.assert_close(gain, lost.sum(0, keepdim=True) if shared else lost, rtol=1e-3, atol=1e-5)
    assert gain.sum() > 0 and (gain >= 0).all()
    assert torch.equal(got, got.to(torch.bfloat16).float())


@pytest.mark.parametrize(("bits", "masked", "turns"), [(3, False, 2), (4, False, 1), (4, True, 2), (8, True, 2)])
def test_a_second_turn_is_for_few_bits_and_pruned_weights(bits: int, masked: bool, turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = case(24, 128)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) > 0.5 if masked else None
    spec, passes = QuantSpec(bits=bits, group_size=32, scale_grid="fp32"), []
    monkeypatch.setattr(fit, "gptq_pass", lambda *given: passes.append(1) or gptq_pass(*given))
    fitted_codes(
        weight if mask is None else weight * mask, searched_grid(weight, spec, mask), hessian, factor_of(hessian, 0.01), spec, mask
    )
    assert len(passes) == turns


def test_pruned_weights_stay_zero() -> None:
    weight, hessian = case(32, 192)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    weight *= mask
    spec = QuantSpec(bits=3, group_size=64)
    factor = factorize(hessian)
    assert factor is not None
    codes, _ = fitted_codes(weight, searched_grid(weight, spec, mask), hessian, factor, spec, mask)
    assert not codes[~mask].any() and codes[mask].any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_fit_starts_from_ranges_that_are_shrunk_little(symmetric: bool) -> None:
    """One loud input per group makes a search shrink the range to what that input's weight needs."""
    weight, _ = case(16, 128)
    loud = torch.ones(128)
    loud[::64] = 1e4
    spec = QuantSpec(bits=2, group_size=64, symmetric=symmetric, scale_grid="fp32")
    whole = searched_grid(weight, spec, factors=())
    start = searched_grid(weight, spec, None, loud, FITTED_FACTORS)
    free = searched_grid(weight, spec, None, loud)
    assert (start.scales >= 0.71 * whole.scales).all()
    assert (free.scales < 0.6 * whole.scales).any()
