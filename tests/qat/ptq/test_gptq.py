"""GPTQ of one layer against a slow textbook one in fp64, and what it does where the textbook breaks down."""

import pytest
import torch
from torch import Tensor

from decoct.models.calibration.factor import damping_steps, factorize
from decoct.qat.fake_quant import dequantize, quantize
from decoct.qat.ptq.gptq import gptq_codes, gptq_pass
from decoct.qat.spec import QuantSpec


def textbook(
    weight: Tensor, scales: Tensor, hessian: Tensor, spec: QuantSpec, damping: float, order: bool, mask: Tensor | None = None
) -> Tensor:
    """Algorithm 1 of the paper with B = 1, column by column, by the Cholesky factor of the inverse; fp64 codes [out, in]."""
    left, matrix = weight.double().clone(), hessian.double().clone()
    columns = left.shape[1]
    by_column = scales.double().repeat_interleave(columns // scales.shape[1], 1)
    kept = torch.ones_like(left) if mask is None else mask.double()
    places = sorted(range(columns), key=lambda i: -float(hessian[i, i])) if order else list(range(columns))
    matrix += torch.eye(columns, dtype=torch.float64) * damping * matrix.diagonal().mean()
    left, by_column, kept, matrix = left[:, places], by_column[:, places], kept[:, places], matrix[places][:, places]
    upper = torch.linalg.cholesky(torch.linalg.inv(matrix)).T
    codes = torch.zeros_like(left)
    for i in range(columns):
        codes[:, i] = (left[:, i] / by_column[:, i]).round().clamp(spec.qmin, spec.qmax) * kept[:, i]
        error = (left[:, i] - codes[:, i] * by_column[:, i]) / upper[i, i]
        left[:, i:] -= error[:, None] * upper[i, i:][None]
    restored = torch.empty_like(codes)
    restored[:, places] = codes
    return restored


def case(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(weight [rows, columns], Hessian of correlated inputs of very different size)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x *= torch.rand(columns, generator=generator) + 0.05
    return torch.randn(rows, columns, generator=generator) * 0.05, 2 / len(x) * x.T @ x


def output_error(codes: Tensor, scales: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    off = dequantize(codes, scales).double() - weight.double()
    return float(((off @ hessian.double()) * off).sum())


def run(weight: Tensor, hessian: Tensor, spec: QuantSpec, order: bool, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    scales = quantize(weight, spec, mask=mask)[1]
    factor = factorize(hessian, 0.01, order)
    assert factor is not None and factor.damping == 0.01
    return gptq_codes(weight, scales, factor, spec, mask), scales


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "bits", "group"), [(24, 192, 4, 64), (7, 320, 3, 32), (5, 96, 2, 32), (3, 33, 4, 11), (1, 5, 8, "channel")]
)
def test_codes_are_the_textbooks(rows: int, columns: int, bits: int, group: int, order: bool) -> None:
    weight, hessian = case(rows, columns)
    spec = QuantSpec(bits=bits, group_size=group)  # pyright: ignore[reportArgumentType]
    codes, scales = run(weight, hessian, spec, order)
    expected = textbook(weight, scales, hessian, spec, 0.01, order)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape and codes.is_contiguous()
    # a value within fp32 rounding of a tie may fall either way, and changes what comes after it in its row
    assert (codes != expected).float().mean() < 0.01
    assert output_error(codes, scales, weight, hessian) == pytest.approx(
        output_error(expected.to(torch.int8), scales, weight, hessian), rel=0.02
    )


def test_it_beats_rounding_to_nearest_and_activation_order_helps() -> None:
    weight, hessian = case(64, 256)
    spec = QuantSpec(bits=3, group_size=64)
    nearest, scales = quantize(weight, spec)
    plain, ordered = (run(weight, hessian, spec, order)[0] for order in (False, True))
    errors = [output_error(codes, scales, weight, hessian) for codes in (nearest, plain, ordered)]
    assert errors[2] < errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("order", [False, True])
def test_independent_inputs_round_to_nearest(order: bool) -> None:
    weight, _ = case(8, 160)
    spec = QuantSpec(bits=4, group_size=32)
    codes, _ = run(weight, torch.diag(torch.rand(160) + 0.1), spec, order)
    assert torch.equal(codes, quantize(weight, spec)[0])


@pytest.mark.parametrize("order", [False, True])
def test_dead_inputs_round_to_nearest_and_leave_the_others_alone(order: bool) -> None:
    weight, hessian = case(16, 128)
    dead = torch.zeros(128, dtype=torch.bool)
    dead[::7] = True
    hessian[dead] = 0
    hessian[:, dead] = 0
    spec = QuantSpec(bits=4, group_size=32)
    codes, scales = run(weight, hessian, spec, order)
    assert torch.equal(codes[:, dead], quantize(weight, spec)[0][:, dead])
    expected = textbook(weight, scales, hessian, spec, 0.01, order)
    assert (codes[:, ~dead] != expected[:, ~dead]).float().mean() < 0.01


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_inputs_that_were_all_zero_round_to_nearest(damping: float) -> None:
    weight, _ = case(4, 64)
    spec = QuantSpec(bits=4, group_size=32)
    factor = factorize(torch.zeros(64, 64), damping)
    assert factor is not None
    assert torch.equal(gptq_codes(weight, quantize(weight, spec)[1], factor, spec), quantize(weight, spec)[0])


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_pass_leaves_the_error_and_its_gradient(damping: float, order: bool, masked: bool) -> None:
    weight, hessian = case(9, 330)
    hessian[7] = hessian[:, 7] = 0  # an input that was always zero counts only where it is damped
    spec = QuantSpec(bits=3, group_size=33)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) > 0.5 if masked else None
    scales = quantize(weight, spec, mask=mask)[1]
    factor = factorize(hessian, damping, order)
    assert factor is not None and factor.damping == damping
    done = gptq_pass(weight, scales, factor, spec, mask)
    off = weight.double() - dequantize(done.codes, scales).double()
    pull = off @ (hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(330))
    torch.testing.assert_close(done.pull(factor).T.double(), pull, rtol=1e-3, atol=1e-3 * float(pull.abs().mean()))
    torch.testing.assert_close(done.energy(factor), (pull * off).sum(1), rtol=1e-4, atol=0)


def test_pruned_weights_stay_zero_and_others_make_it_good() -> None:
    weight, hessian = case(32, 192)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    spec = QuantSpec(bits=4, group_size=64)
    codes, scales = run(weight, hessian, spec, True, mask)
    assert not codes[~mask].any()
    expected = textbook(weight, scales, hessian, spec, 0.01, True, mask)
    assert (codes != expected).float().mean() < 0.01
    nearest = quantize(weight, spec, mask=mask)[0]
    assert output_error(codes, scales, weight, hessian) < 0.9 * output_error(nearest, scales, weight, hessian)


def test_zero_rows_groups_and_strided_weights() -> None:
    weight, hessian = case(12, 128)
    weight[3] = 0
    weight[5, 32:64] = 0
    spec = QuantSpec(bits=4, group_size=32)
    codes, scales = run(weight, hessian, spec, True)
    assert not codes[3].any() and (scales[3] == 1).all() and scales[5, 1] == 1
    strided = weight.T.contiguous().T
    assert torch.equal(run(strided, hessian, spec, True)[0], codes)


def test_stacked_weights_get_the_codes_they_get_alone() -> None:
    weight, hessian = case(48, 256)
    spec = QuantSpec(bits=3, group_size=64)
    whole = run(weight, hessian, spec, True)[0]
    parts = torch.cat([run(part, hessian, spec, True)[0] for part in weight.split(16)])
    # a matrix product of other sizes adds in another order, so a near tie may fall the other way
    assert (whole != parts).float().mean() < 0.01


def test_a_singular_hessian_is_damped_until_it_can_be_factorized() -> None:
    weight, _ = case(8, 128)
    x = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
    hessian = 2 / 20 * x.T @ x
    before = hessian.clone()
    spec = QuantSpec(bits=4, group_size=32)
    factor = factorize(hessian, 0.0)
    assert factor is not None and factor.damping > 0
    assert torch.equal(hessian, before)
    scales = quantize(weight, spec)[1]
    codes = gptq_codes(weight, scales, factor, spec)
    assert output_error(codes, scales, weight, hessian) < output_error(quantize(weight, spec)[0], scales, weight, hessian)


def test_damping_rises_in_steps_and_gives_up_on_what_is_no_hessian() -> None:
    assert damping_steps(0.01) == pytest.approx([0.01, 0.1, 1.0])
    assert damping_steps(0.0) == pytest.approx([0.0, 1e-3, 1e-2, 0.1, 1.0])
    assert damping_steps(0.5) == [0.5]
    matrix = torch.eye(8)
    matrix[0, 1] = matrix[1, 0] = 1.05
    factor = factorize(matrix, 0.01)
    assert factor is not None and factor.damping == pytest.approx(0.1)
    matrix[0, 1] = matrix[1, 0] = 5.0
    assert factorize(matrix, 0.01) is None
