"""The reference against an oracle without torch, and the edges: zeros, ties, tiny, huge, NaN."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from decoct.qat.fake_quant import dequantize, fake_quant, quantize
from decoct.qat.spec import QuantSpec

GRIDS = ("bf16_fp16", "bf16", "fp16", "fp32")
CASES = [
    (bits, group, divisor, grid)
    for bits in (2, 3, 4, 8)
    for group in (32, 16, "channel")
    for divisor, grid in zip(("half_range", "qmax", "full_range", "half_range"), GRIDS)
]


def some_weights(rows: int, columns: int, scale: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * scale
    weight[1] = 0
    weight[2, : columns // 2] = 0
    return weight


@pytest.mark.parametrize(("bits", "group", "divisor", "grid"), CASES)
@pytest.mark.parametrize("scale", [1e-38, 1e-7, 0.03, 1e6])
def test_codes_scales_values_and_gradient_equal_the_oracle(
    oracle: Callable[..., Any], bits: int, group: Any, divisor: Any, grid: Any, scale: float
) -> None:
    spec = QuantSpec(bits=bits, group_size=group, divisor=divisor, scale_grid=grid)
    weight = some_weights(5, 96, scale)
    mask = torch.rand(5, 96, generator=torch.Generator().manual_seed(1)) > 0.5
    for kept in (None, mask):
        codes, scales, values, passes = oracle(weight, spec, kept)
        got_codes, got_scales = quantize(weight, spec, mask=kept)
        latent = weight.clone().requires_grad_()
        result = fake_quant(latent, spec, mask=kept)
        # a loss that is not the last node: the incoming gradient is no constant
        (result * torch.arange(1.0, 97.0)).sum().mul(2).backward()
        assert torch.equal(got_scales, scales)
        assert torch.equal(got_codes, codes)
        assert torch.equal(result, values)
        assert torch.equal(dequantize(got_codes, got_scales), values)
        assert latent.grad is not None
        assert torch.equal(latent.grad, passes * 2 * torch.arange(1.0, 97.0))


def test_halves_round_to_even_and_limits_are_inclusive() -> None:
    # absmax 7.5 makes the scale exactly 1
    weight = torch.tensor([[-7.5, -8.0 + 0.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 6.5, 7.0, 7.0000005, 7.49, 7.5, -7.25, 0.0]])
    latent = weight.clone().requires_grad_()
    result = fake_quant(latent, QuantSpec(bits=4, group_size=16))
    result.sum().backward()
    assert result.tolist() == [[-8.0, -8.0, -2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 4.0, 6.0, 7.0, 7.0, 7.0, 7.0, -7.0, 0.0]]
    assert latent.grad is not None
    assert latent.grad.tolist() == [[1.0] * 11 + [0.0, 0.0, 0.0, 1.0, 1.0]]


def test_lower_limit_is_inclusive_and_beyond_it_nothing_passes() -> None:
    # qmax divisor: absmax 1 gives scale 1 at 2 bits, so every value lies on or inside the limits but none beyond; fp32 has no grid
    weight = torch.tensor([[-1.0, 1.0, -0.5, 0.5]], requires_grad=True)
    fake_quant(weight, QuantSpec(bits=2, group_size=4, divisor="qmax", scale_grid="fp32")).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1.0, 1.0, 1.0, 1.0]]
    # a scale rounded down by its grid puts -absmax / s just below qmin with the full_range divisor
    weight = torch.tensor([[-8.01, 1.0]], requires_grad=True)
    fake_quant(weight, QuantSpec(bits=4, group_size=2, divisor="full_range")).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0.0, 1.0]]


def test_zero_groups_have_scale_one_and_pass_gradients() -> None:
    weight = torch.zeros(2, 32, requires_grad=True)
    spec = QuantSpec(bits=4, group_size=16)
    result = fake_quant(weight, spec)
    result.sum().backward()
    codes, scales = quantize(weight, spec)
    assert not result.any()
    assert not codes.any()
    assert torch.equal(scales, torch.ones(2, 2))
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(2, 32))


def test_zeros_are_positive_so_that_bytes_match_the_codes() -> None:
    result = fake_quant(torch.tensor([[-1e-3, -0.0, 1.0, -1.0]]), QuantSpec(bits=4, group_size=4))
    assert not torch.signbit(result[0, :2]).any()


def test_scales_stay_inside_the_grid_limits() -> None:
    spec = QuantSpec(bits=4, group_size=16)
    weight = torch.cat([torch.full((1, 16), 1e-30), torch.full((1, 16), -3e38)])
    codes, scales = quantize(weight, spec)
    assert scales.flatten().tolist() == [2.0**-17, 65280.0]
    assert codes[0].tolist() == [0] * 16
    assert codes[1].tolist() == [-8] * 16


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_weight_spoils_its_group_and_only_it(bad: float) -> None:
    spec = QuantSpec(bits=4, group_size=16)
    weight = some_weights(4, 32, 0.1)
    weight[3, 20] = bad
    latent = weight.clone().requires_grad_()
    result = fake_quant(latent, spec)
    result.sum().backward()
    assert result[3, 16:].isnan().all()
    assert result.isnan().sum() == 16
    assert latent.grad is not None
    assert not latent.grad[3, 16:].any()
    with pytest.raises(ValueError, match=r"1 of 8 groups hold NaN or infinite weights, first row 3 group 1"):
        quantize(weight, spec)


def test_half_precision_weights_are_computed_in_fp32_and_rounded_once() -> None:
    spec = QuantSpec(bits=8, group_size=16)
    for dtype in (torch.bfloat16, torch.float16):
        weight = some_weights(4, 32, 0.1).to(dtype)
        latent = weight.clone().requires_grad_()
        result = fake_quant(latent, spec)
        result.sum().backward()
        assert result.dtype == dtype
        assert latent.grad is not None
        assert latent.grad.dtype == dtype
        assert torch.equal(result, fake_quant(weight.float(), spec).to(dtype))
        assert torch.equal(dequantize(*quantize(weight, spec)).to(dtype), result)


def test_fp64_stays_fp64() -> None:
    spec = QuantSpec(bits=4, group_size=16)
    # 2.5 + 1e-12 rounds to 3 in fp64, to 2 once it has been through fp32
    weight = torch.tensor([[7.5, 2.5 + 1e-12] + [0.0] * 14], dtype=torch.float64)
    assert fake_quant(weight, spec)[0, 1].item() == 3.0
    assert fake_quant(weight, spec).dtype == torch.float64
    assert quantize(weight, spec)[1].dtype == torch.float32


def test_every_element_is_written(poisoned: None, oracle: Callable[..., Any]) -> None:
    spec = QuantSpec(bits=3, group_size=16)
    weight = some_weights(7, 48, 0.1)
    codes, scales, values, _ = oracle(weight, spec)
    got_codes, got_scales = quantize(weight, spec)
    assert torch.equal(fake_quant(weight, spec), values)
    assert torch.equal(got_codes, codes)
    assert torch.equal(got_scales, scales)
