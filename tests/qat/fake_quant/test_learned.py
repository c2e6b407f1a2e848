"""Given scales, the reference: values, both gradients against fp64, limits, masks, bad numbers, compile, checkpointing."""

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from decoct.qat.fake_quant import dequantize, fake_quant, fake_quant_learned, quantize, quantize_with
from decoct.qat.spec import QuantSpec

SPEC = QuantSpec(bits=4, group_size=16)


def some_weights(rows: int = 5, columns: int = 96, scale: float = 0.05) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) * scale
    weight[1] = 0
    return weight


def some_scales(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Near the absmax scales, off the grid, small enough that some weights are clipped."""
    scales = quantize(weight, spec)[1]
    return scales * (0.5 + torch.rand(scales.shape, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("grid", ["bf16_fp16", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("group", [32, 96, "channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_equal_fp64(lsq_oracle: Callable[..., Any], bits: int, group: Any, grid: Any, dtype: torch.dtype) -> None:
    spec = QuantSpec(bits=bits, group_size=group, scale_grid=grid)
    weight = some_weights().to(dtype)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for kept in (None, mask):
        latent, scale = weight.clone().requires_grad_(), some_scales(weight, spec).requires_grad_()
        # a loss that is not the last node: the incoming gradient is no constant
        (fake_quant_learned(latent, scale, spec, mask=kept) * upstream).sum().backward()
        weight_grad, scale_grad, size = lsq_oracle(weight, quantize_with(weight, scale, spec)[1], spec, upstream, kept)
        assert latent.grad is not None and scale.grad is not None
        assert torch.equal(latent.grad.double(), weight_grad)
        assert bool(((scale.grad - scale_grad).abs() <= 1e-6 * size).all()), ((scale.grad - scale_grad).abs() / size).max()
        assert bool((scale.grad[0] != 0).any())
        assert not scale.grad[1].any()


def test_gradients_by_hand() -> None:
    # v = -9, -8, -0.75, 0.5, 2.25, 7, 7.5, 0 at scale 2; upstream = 1, 2, 4, ...
    weight = torch.tensor([[-18.0, -16.0, -1.5, 1.0, 4.5, 14.0, 15.0, 0.0]], requires_grad=True)
    scale = torch.tensor([[2.0]], requires_grad=True)
    upstream = 2.0 ** torch.arange(8)
    result = fake_quant_learned(weight, scale, QuantSpec(bits=4, group_size=8))
    (result * upstream).sum().backward()
    assert result.tolist() == [[-16.0, -16.0, -2.0, 0.0, 4.0, 14.0, 14.0, 0.0]]
    assert weight.grad is not None and scale.grad is not None
    assert weight.grad.tolist() == [[0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 0.0, 128.0]]
    terms = [-8.0, 0.0, -0.25 * 4, -0.5 * 8, -0.25 * 16, 0.0, 7.0 * 64, 0.0]
    assert scale.grad.item() == pytest.approx(sum(terms) / math.sqrt(8 * 7), rel=1e-6)


def test_equals_absmax_fake_quant_at_its_scales() -> None:
    for bits in range(2, 9):
        spec = QuantSpec(bits=bits, group_size=16)
        weight = some_weights()
        codes, scales = quantize(weight, spec)
        assert torch.equal(fake_quant_learned(weight, scales, spec), fake_quant(weight, spec))
        got_codes, got_scales = quantize_with(weight, scales, spec)
        assert torch.equal(got_codes, codes)
        assert torch.equal(got_scales, scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_codes_and_scales_are_the_forward(poisoned: None, dtype: torch.dtype) -> None:
    weight = some_weights(7, 48).to(dtype)
    mask = weight > -0.02
    scales = some_scales(weight.float(), SPEC)
    codes, rounded = quantize_with(weight, scales, SPEC, mask=mask)
    result = fake_quant_learned(weight, scales, SPEC, mask=mask)
    assert codes.dtype == torch.int8
    assert torch.equal(rounded, scales.bfloat16().float())
    assert torch.equal(dequantize(codes, rounded).to(dtype), result)
    assert not result[~mask].any()
    assert not torch.signbit(result[result == 0]).any()


def test_rounding_is_half_to_even_of_the_true_quotient() -> None:
    weight = torch.arange(-40, 41).float().mul(0.05)[None]
    codes, scales = quantize_with(weight, torch.tensor([[0.1]]), QuantSpec(bits=6, group_size="channel", scale_grid="fp32"))
    expected = [min(max(round(Fraction(float(w / scales[0, 0]))), -32), 31) for w in weight[0]]
    assert codes[0].tolist() == expected


def test_scales_beyond_the_limits_act_as_the_limit_and_can_only_come_back() -> None:
    spec = QuantSpec(bits=4, group_size=2)
    weight = torch.tensor([[1.0, -1.0]] * 6)
    scale = torch.tensor([[-1.0], [0.0], [2.0**-18], [2.0**-17], [1e6], [1e6]], requires_grad=True)
    assert quantize_with(weight, scale, spec)[1].flatten().tolist() == [2.0**-17] * 4 + [65280.0] * 2
    # the values of clipped weights are 7 s and -8 s: with this gradient the loss falls as s grows
    upstream = torch.tensor([[-1.0, 1.0]]).expand(6, 2).clone()
    upstream[1] *= -1
    upstream[5] *= -1
    (fake_quant_learned(weight, scale, spec) * upstream).sum().backward()
    assert scale.grad is not None
    signs = scale.grad.sign().flatten().tolist()
    assert signs[:4] == [-1.0, 0.0, -1.0, -1.0]
    # far above: v is nearly 0, the terms are -v dy; towards larger scales in row 5, back in row 4
    assert signs[4:] == [1.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_numbers_are_seen(bad: float) -> None:
    weight, scales = some_weights(4, 32), torch.full((4, 2), 0.01)
    spoilt = weight.clone()
    spoilt[3, 20] = bad
    result = fake_quant_learned(spoilt, scales, SPEC)
    assert result.isnan().nonzero().tolist() == [[3, 20]]
    with pytest.raises(ValueError, match=r"1 of 128 weights are NaN or infinite, first at \[3, 20\]"):
        quantize_with(spoilt, scales, SPEC)
    scales[2, 1] = bad
    latent, scale = weight.clone().requires_grad_(), scales.requires_grad_()
    result = fake_quant_learned(latent, scale, SPEC)
    assert result[2, 16:].isnan().all()
    assert result.isnan().sum() == 16
    result.sum().backward()
    assert latent.grad is not None and scale.grad is not None
    assert not latent.grad[2, 16:].any()
    assert scale.grad.isnan().nonzero().tolist() == [[2, 1]]
    with pytest.raises(ValueError, match=r"1 of 8 scales are NaN or infinite, first at \[2, 1\]"):
        quantize_with(weight, scales, SPEC)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    weight, scales = some_weights(), some_scales(some_weights(), SPEC)
    both = (weight.clone().requires_grad_(), scales.clone().requires_grad_())
    fake_quant_learned(*both, SPEC).square().sum().backward()
    alone = (weight.clone().requires_grad_(), scales.clone().requires_grad_())
    fake_quant_learned(alone[0], scales, SPEC).square().sum().backward()
    fake_quant_learned(weight, alone[1], SPEC).square().sum().backward()
    for one, other in zip(both, alone):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_non_contiguous_and_runs_repeat() -> None:
    weight, upstream = some_weights(), torch.randn(96, 5, generator=torch.Generator().manual_seed(3)).t()
    scales = some_scales(weight, SPEC)
    mask = torch.rand(96, 5, generator=torch.Generator().manual_seed(1)).t() > 0.5
    grads = []
    for strided in (False, True, True):
        latent = weight.t().contiguous().t() if strided else weight.clone()
        scale = scales.t().contiguous().t() if strided else scales.clone()
        assert latent.is_contiguous() != strided
        latent.requires_grad_()
        scale.requires_grad_()
        result = fake_quant_learned(latent, scale, SPEC, mask=mask if strided else mask.contiguous())
        result.backward(upstream if strided else upstream.contiguous())
        grads.append((result, latent.grad, scale.grad))
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other))


def loss(weight: Tensor, scale: Tensor, inputs: Tensor) -> Tensor:
    return F.linear(inputs, fake_quant_learned(weight, scale, SPEC)).square().sum() * 2


def test_autocast_changes_nothing() -> None:
    weight, scales = some_weights(), some_scales(some_weights(), SPEC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latent, scale = weight.clone().requires_grad_(), scales.clone().requires_grad_()
        result = fake_quant_learned(latent, scale, SPEC)
        F.linear(torch.ones(2, 96), result).sum().backward()
    assert torch.equal(result, fake_quant_learned(weight, scales, SPEC))
    assert latent.grad is not None and scale.grad is not None
    assert latent.grad.dtype == scale.grad.dtype == torch.float32


@pytest.mark.parametrize("how", ["checkpoint", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_checkpointed_and_compiled_equal_eager(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the compiler's cache does not see the code of a custom op's backward
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    weight, inputs = some_weights(), torch.randn(3, 96, generator=torch.Generator().manual_seed(5))
    scales = some_scales(weight, SPEC)
    grads = []
    for wrapped in (False, True):
        latent, scale = weight.clone().requires_grad_(), scales.clone().requires_grad_()
        if not wrapped:
            value = loss(latent, scale, inputs)
        elif how == "checkpoint":
            value = checkpoint(loss, latent, scale, inputs, use_reentrant=False)
        else:
            value = torch.compile(loss, backend=how, fullgraph=True)(latent, scale, inputs)
        assert isinstance(value, Tensor)
        value.backward()
        grads.append((latent.grad, scale.grad))
    for got, expected in zip(grads[1], grads[0]):
        if how == "inductor":
            torch.testing.assert_close(got, expected)
        else:
            assert torch.equal(got, expected)


def test_operator_is_registered_soundly() -> None:
    weight, scales = some_weights(), some_scales(some_weights(), SPEC)
    arguments = (weight > 0, None, 4, 16, [16.0, 2.0**-17, 65280.0], 0.1)
    operator = torch.ops.decoct.fake_quant_learned_reference.default
    torch.library.opcheck(operator, (weight.requires_grad_(), scales.requires_grad_(), *arguments))


def test_empty() -> None:
    assert fake_quant_learned(torch.zeros(0, 32), torch.ones(0, 2), SPEC).shape == (0, 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(16)}, "weight must be a floating point matrix"),
        ({"scale": torch.ones(6, 3)}, r"scale must be float32 of shape \(6, 2\) on cpu for a weight of shape \(6, 32\); got torch.float32"),
        ({"scale": torch.ones(6, 2).bfloat16()}, "got torch.bfloat16"),
        ({"zeros": torch.ones(6, 2).char()}, "the spec is symmetric and has no zero point"),
        ({"spec": QuantSpec(kind="nf4", group_size=16)}, "given scales need kind='int'"),
        ({"mask": torch.ones(6, 32)}, "mask must be bool"),
        ({"spec": QuantSpec(group_size=64)}, "group_size=64 does not divide in_features=32"),
        ({"backend": "cuda"}, "backend='cuda' is not one of"),
    ],
)
@pytest.mark.parametrize("function", [fake_quant_learned, quantize_with])
def test_bad_arguments_are_named(function: Any, change: dict[str, Any], words: str) -> None:
    arguments = {"weight": torch.zeros(6, 32), "scale": torch.ones(6, 2), "spec": SPEC} | change
    with pytest.raises(ValueError, match=words):
        function(arguments.pop("weight"), arguments.pop("scale"), arguments.pop("spec"), **arguments)
