"""Zero points and scales of the whole tensor: the reference against an oracle without torch, properties, gradients, bad numbers."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from decoct.qat.fake_quant import Encoded, decode, dequantize, encode, fake_quant, fake_quant_learned, quantize, quantize_with
from decoct.qat.spec import QuantSpec

ASYMMETRIC = QuantSpec(bits=4, group_size=16, symmetric=False)


def some_weights(rows: int = 5, columns: int = 48, scale: float = 0.05) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) * scale
    weight += torch.arange(rows)[:, None] * scale
    weight[1] = 0
    weight[2] = weight[2].abs()
    weight[3] = -weight[3].abs()
    return weight


def oracle(group: np.ndarray, spec: QuantSpec) -> tuple[float, int, list[int]]:
    """(scale, zero point, codes) of one group on the grid bf16 in [2^-17, 65280], one weight at a time."""
    low, high = min(np.float32(0), group.min()), max(np.float32(0), group.max())
    if spec.symmetric:
        wanted = np.float32(max(high, -low)) / np.float32(spec.divisor_value)
    else:
        wanted = np.float32(high - low) / np.float32(2**spec.bits - 1)
    scale = 1.0
    if high != low:
        near = np.array([wanted], np.float32).view(np.uint32)[0]
        # neighbours in bf16, the nearer one, on a tie the even one
        below = int(near) >> 16
        values = [float(np.array([c << 16], np.uint32).view(np.float32)[0]) for c in (below, below + 1)]
        pick = min((0, 1), key=lambda i: (abs(Fraction(values[i]) - Fraction(float(wanted))), (below + i) % 2))
        scale = min(max(values[pick], 2.0**-17), 65280.0)
    qmin, qmax = spec.qmin, spec.qmax
    zero = 0
    if not spec.symmetric:
        zero = min(max(round(Fraction(float(np.float32(qmin) - np.float32(low) / np.float32(scale)))), qmin), qmax)
    codes = [min(max(round(Fraction(float(w / np.float32(scale)))) + zero, qmin), qmax) for w in group]
    return scale, zero, codes


@pytest.mark.parametrize("size", [1e-7, 0.05, 1e6])
@pytest.mark.parametrize(("symmetric", "group"), [(False, 16), (False, 48), (False, "channel"), (False, "tensor"), (True, "tensor")])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_scales_and_zero_points_equal_the_oracle(poisoned: None, bits: int, symmetric: bool, group: Any, size: float) -> None:
    spec = QuantSpec(bits=bits, group_size=group, symmetric=symmetric)
    weight = some_weights(scale=size)
    for mask in (None, torch.rand(5, 48, generator=torch.Generator().manual_seed(1)) > 0.4):
        kept = (weight if mask is None else weight * mask).numpy()
        encoded = encode(weight, spec, mask=mask)
        shape = spec.scale_shape(5, 48)
        assert tuple(encoded.scales.shape) == shape
        assert (encoded.zeros is None) == symmetric
        expected = [oracle(part, spec) for part in kept.reshape(math.prod(shape), -1)]
        assert encoded.scales.flatten().tolist() == [scale for scale, _, _ in expected]
        if encoded.zeros is not None:
            assert encoded.zeros.flatten().tolist() == [zero for _, zero, _ in expected]
        assert encoded.codes.flatten().tolist() == [code for _, _, codes in expected for code in codes]
        assert torch.equal(decode(encoded, spec), fake_quant(weight, spec, mask=mask))


weights = hnp.arrays(np.float32, (3, 16), elements=st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, 1.0, -1.0]))


@settings(max_examples=100, deadline=None)
@given(weights, st.integers(2, 8), st.sampled_from([8, "channel", "tensor"]))
def test_zero_stays_zero_and_errors_are_half_a_step(array: np.ndarray, bits: int, group: Any) -> None:
    spec = QuantSpec(bits=bits, group_size=group, symmetric=False, scale_grid="fp32")
    weight = torch.from_numpy(array)
    encoded = encode(weight, spec)
    assert spec.qmin <= int(encoded.codes.min()) <= int(encoded.codes.max()) <= spec.qmax
    values = decode(encoded, spec)
    assert torch.equal(values, fake_quant(weight, spec))
    assert not values[weight == 0].any()
    # half a step from rounding, half a step where the rounded zero point moves the range
    step = encoded.scales.expand(3, -1).repeat_interleave(16 // encoded.scales.shape[1], 1)
    assert bool(((values - weight).abs() <= 1.0001 * step).all())


def test_gradients_with_zero_points_equal_fp64() -> None:
    weight = some_weights()
    for bits in (2, 4, 8):
        spec = QuantSpec(bits=bits, group_size=16, symmetric=False)
        encoded = encode(weight, spec)
        assert encoded.zeros is not None
        latent = weight.clone().requires_grad_()
        scale = (encoded.scales * (0.7 + 0.3 * torch.rand(5, 3, generator=torch.Generator().manual_seed(1)))).requires_grad_()
        upstream = torch.randn(5, 48, generator=torch.Generator().manual_seed(2))
        result = fake_quant_learned(latent, scale, spec, zeros=encoded.zeros)
        (result * upstream).sum().backward()
        codes, scales = quantize_with(weight, scale, spec, zeros=encoded.zeros)
        assert torch.equal(dequantize(codes, scales, encoded.zeros), result)
        value = (weight.view(5, 3, 16) / scales.unsqueeze(-1)).double()
        low, high = (limit - encoded.zeros.double().unsqueeze(-1) for limit in (spec.qmin, spec.qmax))
        inside = (value >= low) & (value <= high)
        exact = weight.view(5, 3, 16).double() / scales.double().unsqueeze(-1)
        terms = torch.where(inside, value.round() - exact, torch.where(value < low, low, high)) * upstream.view(5, 3, 16)
        expected = terms.sum(-1) / math.sqrt(16 * spec.qmax)
        assert latent.grad is not None and scale.grad is not None
        assert torch.equal(latent.grad, upstream * inside.view(5, 48))
        assert not bool(inside.all())
        assert bool(((scale.grad - expected).abs() <= 1e-6 * terms.abs().sum(-1)).all())


def test_a_scale_for_the_whole_tensor_is_learned() -> None:
    spec, weight = QuantSpec(bits=4, group_size="tensor"), some_weights()
    _, scales = quantize(weight, spec)
    latent, scale = weight.clone().requires_grad_(), (scales * 0.6).requires_grad_()
    upstream = torch.randn(5, 48, generator=torch.Generator().manual_seed(2))
    (fake_quant_learned(latent, scale, spec) * upstream).sum().backward()
    # one row of the same numbers is the same group
    flat, same = weight.view(1, -1).clone().requires_grad_(), scale.detach().clone().requires_grad_()
    (fake_quant_learned(flat, same, QuantSpec(bits=4, group_size="channel")) * upstream.view(1, -1)).sum().backward()
    assert latent.grad is not None and flat.grad is not None
    assert torch.equal(latent.grad.view(1, -1), flat.grad)
    torch.testing.assert_close(scale.grad, same.grad, rtol=1e-6, atol=1e-7)


def test_fp64_and_half_precision() -> None:
    weight = some_weights().double()
    assert fake_quant(weight, ASYMMETRIC).dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        half = weight.to(dtype)
        assert torch.equal(fake_quant(half, ASYMMETRIC), fake_quant(half.float(), ASYMMETRIC).to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_weights_spoil_their_group(bad: float) -> None:
    weight = some_weights()
    weight[4, 20] = bad
    result = fake_quant(weight, ASYMMETRIC)
    assert result.isnan().sum() == 16
    assert result[4, 16:32].isnan().all()
    with pytest.raises(ValueError, match="1 of 15 groups hold NaN or infinite weights, first row 4 group 1"):
        encode(weight, ASYMMETRIC)
    for symmetric in (False, True):
        whole = QuantSpec(group_size="tensor", symmetric=symmetric)
        assert fake_quant(weight, whole).isnan().all()
        with pytest.raises(ValueError, match="1 of 1 groups hold NaN"):
            encode(weight, whole)


def test_huge_ranges_do_not_overflow() -> None:
    weight = torch.tensor([[3e38, -3e38] + [0.0] * 14])
    spec = QuantSpec(bits=8, group_size=16, symmetric=False, scale_grid="fp32")
    assert bool(fake_quant(weight, spec).isfinite().all())


def test_compiled_and_non_contiguous_equal_eager() -> None:
    weight, mask = some_weights(), some_weights() > -0.01
    strided, strided_mask = weight.t().contiguous().t(), mask.t().contiguous().t()
    for spec in (ASYMMETRIC, QuantSpec(group_size="tensor")):
        expected = fake_quant(weight, spec, mask=mask)
        compiled = torch.compile(lambda w, m, s=spec: fake_quant(w, s, mask=m), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(weight, mask), expected)
        assert torch.equal(fake_quant(strided, spec, mask=strided_mask), expected)


def test_operator_is_registered_soundly() -> None:
    weight = some_weights()
    for shared in (False, True):
        arguments = (weight, weight > 0, 4, 16, shared, False, 15.0, [16.0, 2.0**-17, 65280.0])
        torch.library.opcheck(torch.ops.decoct.range_grid_reference.default, arguments)


def test_what_has_zero_points_says_so() -> None:
    weight, scale = some_weights(), torch.ones(5, 3)
    with pytest.raises(ValueError, match=r"symmetric=false come with zero points; call encode\(\)"):
        quantize(weight, ASYMMETRIC)
    with pytest.raises(ValueError, match=r"symmetric=false needs zeros: int8 of shape \(5, 3\)"):
        fake_quant_learned(weight, scale, ASYMMETRIC)
    with pytest.raises(ValueError, match=r"zeros must be int8 of shape \(5, 3\) on cpu; got torch.int32"):
        fake_quant_learned(weight, scale, ASYMMETRIC, zeros=torch.ones(5, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"zeros of shape \(5, 1\) do not fit scales of shape \(5, 3\)"):
        decode(Encoded(weight.char(), scale, torch.ones(5, 1).char()), ASYMMETRIC)
