"""GPTQ on super-blocks against the paper's algorithm in fp64, and the fit of d and dmin against the error that it claims to lower."""

import pytest
import torch
from torch import Tensor

from decoct.models.calibration.factor import factorize
from decoct.qat.fake_quant.super_reference import decoded, scales_of_weight, steps
from decoct.qat.ptq.methods import METHODS, RoundingMethod, Stack
from decoct.qat.ptq.super_gptq import fitted_super, fitted_super_codes, super_gptq_pass
from decoct.qat.ptq.super_search import SuperScales, searched_super
from decoct.qat.spec import QuantSpec

KINDS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
INPUTS = 512


def layer(outputs: int = 12) -> tuple[Tensor, Tensor]:
    """(weight, Hessian of correlated inputs)."""
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(outputs, INPUTS, generator=generator) * 0.05
    mixed = torch.randn(INPUTS, INPUTS, generator=generator) / INPUTS**0.5 + torch.eye(INPUTS)
    inputs = torch.randn(2048, INPUTS, generator=generator) @ mixed * torch.rand(INPUTS, generator=generator)
    return weight, 2 * inputs.T @ inputs / len(inputs)


def error(weight: Tensor, codes: Tensor, found: SuperScales, hessian: Tensor) -> Tensor:
    """fp64 [out]: (w - y) H (w - y)^T."""
    off = (weight - decoded(codes, found.scales, found.sub)).double()
    return ((off @ hessian.double()) * off).sum(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [True, False])
def test_codes_are_those_of_the_paper(kind: str, order: bool) -> None:
    weight, hessian = layer(4)
    found = searched_super(weight, kind)
    factor = factorize(hessian.clone(), 0.01, order)
    assert factor is not None
    codes = super_gptq_pass(weight, found, factor, kind).codes
    # algorithm 1 without blocks: the upper Cholesky factor of the inverse of the damped Hessian
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(INPUTS, dtype=torch.float64)
    perm = factor.order
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[perm][:, perm]), upper=True)
    form = QuantSpec(kind=kind).super_block  # pyright: ignore[reportArgumentType]
    assert form is not None
    step, under = steps(*found)
    left, slow = weight.double()[:, perm].clone(), torch.zeros(weight.shape, dtype=torch.int8)
    for k, column in enumerate(perm.tolist()):
        scale, deep = step[:, column // form.width].double(), 0 if under is None else under[:, column // form.width].double()
        code = ((left[:, k] + deep) / scale).round().clamp(*form.codes)
        slow[:, column] = code.to(torch.int8)
        left[:, k + 1 :] -= ((left[:, k] - (code * scale - deep)) / upper[k, k])[:, None] * upper[k, k + 1 :]
    # fp32 may round a number in the middle of two codes to the other side, and later columns follow
    assert float((codes != slow).double().mean()) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_fit_lowers_the_error_by_what_it_says(kind: str) -> None:
    weight, hessian = layer()
    found = searched_super(weight, kind, None, hessian.diagonal())
    factor = factorize(hessian.clone(), 0.01, True)
    assert factor is not None
    damping = 0.01 * float(hessian.diagonal().mean())
    done = super_gptq_pass(weight, found, factor, kind)
    damped = hessian + damping * torch.eye(INPUTS)
    before = error(weight, done.codes, found, damped)
    assert torch.allclose(done.energy(factor), before, rtol=1e-3)
    fitted, gain = fitted_super(done.columns, found, done.pull(factor), hessian, kind, damping)
    after = error(weight, done.codes, fitted, damped)
    assert bool((gain > 0).any())
    assert torch.allclose(before - after, gain, rtol=0.02, atol=1e-3 * float(before.mean()))
    # fp16 numbers, as they are stored
    assert torch.equal(fitted.scales, fitted.scales.half().float())


@pytest.mark.parametrize("kind", KINDS)
def test_methods_get_better_in_their_order(kind: str) -> None:
    weight, hessian = layer()
    spec = QuantSpec(kind=kind)  # pyright: ignore[reportArgumentType]
    stack = Stack(weight=weight, mask=None, moments=hessian)
    found = []
    for method, dials in (("rtn", {}), ("mse", {}), ("mse", {"weighted": True}), ("gptq", {"scale": "mse"}), ("gptq", {})):
        rounding = RoundingMethod(method=method, **dials)  # pyright: ignore[reportArgumentType]
        result = METHODS[method].round(stack, spec, rounding)
        assert result.note is None
        assert result.sub is not None
        found.append(float(error(weight, result.codes, SuperScales(result.scales, result.sub), hessian).sum()))
        rows = result.rows(slice(2, 4))
        assert torch.equal(result.values(spec)[2:4], decoded(rows.codes, rows.scales, rows.sub))  # pyright: ignore[reportArgumentType]
    assert found == sorted(found, reverse=True)
    # GPTQ against rounding to nearest: between 0.2 and 0.5 of the error on these inputs
    assert found[-1] < 0.6 * found[0]


def test_pruned_weights_keep_code_zero() -> None:
    weight, hessian = layer()
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(7)) > 0.5
    stack = Stack(weight=weight * mask, mask=mask, moments=hessian)
    result = METHODS["gptq"].round(stack, QuantSpec(kind="q6_k"), RoundingMethod(method="gptq"))
    assert not result.codes[~mask].any()
    plain = METHODS["rtn"].round(stack, QuantSpec(kind="q6_k"), RoundingMethod())
    assert result.sub is not None
    assert plain.sub is not None
    ours = error(weight * mask, result.codes, SuperScales(result.scales, result.sub), hessian).sum()
    assert ours < error(weight * mask, plain.codes, SuperScales(plain.scales, plain.sub), hessian).sum()


def test_a_hessian_without_a_factor_is_told() -> None:
    weight, _ = layer(2)
    hessian = torch.full((INPUTS, INPUTS), torch.nan)
    result = METHODS["gptq"].round(Stack(weight=weight, mask=None, moments=hessian), QuantSpec(kind="q4_k"), RoundingMethod(method="gptq"))
    assert str(result.note).startswith("rounded to nearest")


def test_absmax_scales_are_those_of_rounding_to_nearest() -> None:
    weight, hessian = layer(3)
    rounding = RoundingMethod(method="gptq", scale="absmax")
    result = METHODS["gptq"].round(Stack(weight=weight, mask=None, moments=hessian), QuantSpec(kind="q4_k"), rounding)
    assert torch.equal(result.scales, scales_of_weight(weight, "q4_k")[0])


def test_a_second_turn_never_hurts_a_row() -> None:
    weight, hessian = layer()
    found = searched_super(weight, "q2_k", None, hessian.diagonal())
    factor = factorize(hessian.clone(), 0.01, True)
    assert factor is not None
    damping = 0.01 * float(hessian.diagonal().mean())
    once = super_gptq_pass(weight, found, factor, "q2_k")
    first, _ = fitted_super(once.columns, found, once.pull(factor), hessian, "q2_k", damping)
    codes, scales = fitted_super_codes(weight, found, hessian, factor, "q2_k")
    damped = hessian + damping * torch.eye(INPUTS)
    assert bool((error(weight, codes, scales, damped) <= error(weight, once.codes, first, damped) * 1.001).all())
