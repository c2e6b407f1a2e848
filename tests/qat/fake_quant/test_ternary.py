"""Ternary codes: values, both gradients, searched and GPTQ codes, and training that keeps them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from decoct.qat.fake_quant import decode, encode, fake_quant, fake_quant_learned, quantize_with
from decoct.qat.layers.quant_linear import Extras, QuantLinear
from decoct.qat.ptq.methods import METHODS, RoundingMethod, Stack
from decoct.qat.scheme import SpecChange
from decoct.qat.spec import QuantSpec

SPEC = QuantSpec(ternary=True, group_size=32)


def some_weights() -> torch.Tensor:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1)) * 0.05
    weight[1] = 0
    return weight


def test_it_is_two_bits_with_one_code_less() -> None:
    assert (SPEC.bits, SPEC.qmin, SPEC.qmax, SPEC.holds_zero) == (2, -1, 1, True)
    assert SPEC.words() == "ternary codes in groups of 32"
    assert QuantSpec.from_json(SPEC.to_json()) == SPEC
    # records and hashes of other specs stay as they were
    assert "ternary" not in QuantSpec(bits=2).to_json()
    # where bits are annealed, the codes are ternary at the end
    assert not SPEC.with_bits(4).ternary and SPEC.with_bits(4).qmin == -8
    assert SPEC.with_bits(2) == SPEC


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bits": 3}, "ternary codes are -1, 0 and 1, which bits=3 does not fit"),
        ({"symmetric": False}, "ternary codes are -1, 0 and 1, which symmetric=false does not fit"),
        ({"kind": "nf4"}, "ternary=true has no effect with kind='nf4'"),
    ],
)
def test_what_does_not_go_with_it_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QuantSpec(ternary=True, **given)


def test_a_change_of_the_codes_ends_it() -> None:
    assert SpecChange(bits=8).applied(SPEC) == QuantSpec(bits=8, group_size=32)
    assert SpecChange(kind="q6_k").applied(SPEC) == QuantSpec(kind="q6_k")
    assert SpecChange(symmetric=False).applied(SPEC) == QuantSpec(bits=2, group_size=32, symmetric=False)
    assert SpecChange(group_size=16).applied(SPEC) == QuantSpec(ternary=True, group_size=16)
    assert SpecChange(ternary=True).applied(QuantSpec(bits=8, group_size=32)) == SPEC
    assert SpecChange(ternary=False, bits=4).applied(SPEC) == QuantSpec(bits=4, group_size=32)


@pytest.mark.parametrize("masked", [False, True])
def test_values_are_codes_times_scales(masked: bool) -> None:
    weight = some_weights()
    mask = weight > -0.03 if masked else None
    values = fake_quant(weight, SPEC, mask=mask)
    encoded = encode(weight, SPEC, mask=mask)
    assert set(encoded.codes.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(decode(encoded, SPEC), values)
    # by hand: absmax / 1.5, halves to even, limits of one
    kept = weight if mask is None else weight * mask
    scale = (kept.view(6, 3, 32).abs().amax(2) / 1.5).bfloat16().float().clamp(min=2.0**-17)
    expected = (kept.view(6, 3, 32) / scale.unsqueeze(2)).round().clamp(-1, 1) * scale.unsqueeze(2)
    assert torch.equal(values, (expected + 0.0).view(6, 96))
    plain = QuantSpec(bits=2, group_size=32)
    assert not torch.equal(encode(weight, plain).codes, encoded.codes)


def test_gradients_equal_fp64(lsq_oracle: Callable[..., Any]) -> None:
    weight = some_weights()
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    latent = weight.clone().requires_grad_()
    scale = (encode(weight, SPEC).scales * 0.4).requires_grad_()
    (fake_quant_learned(latent, scale, SPEC) * upstream).sum().backward()
    weight_grad, scale_grad, size = lsq_oracle(weight, quantize_with(weight, scale, SPEC)[1], SPEC, upstream, None)
    assert latent.grad is not None and scale.grad is not None
    assert torch.equal(latent.grad.double(), weight_grad)
    assert bool(((scale.grad - scale_grad).abs() <= 1e-6 * size).all())
    # scales this small clip weights at both ends
    assert 0 < float((latent.grad == 0).float().mean()) < 0.9


def test_search_and_gptq_lose_less() -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(3)) * 0.05
    x = torch.randn(400, 96, generator=torch.Generator().manual_seed(4)) @ torch.randn(96, 96, generator=torch.Generator().manual_seed(5))
    stack = Stack(weight=weight, mask=None, moments=2 * x.T @ x / len(x))
    lost = []
    for method in ("rtn", "mse", "gptq"):
        found = METHODS[method].round(stack, SPEC, RoundingMethod(method=method, weighted=True))
        assert set(found.codes.unique().tolist()) == {-1, 0, 1}
        lost.append(float(((weight - found.values(SPEC)) @ x.T).square().sum()))
    assert lost[2] < 0.7 * lost[1] < 0.7 * lost[0]


def test_training_moves_codes_and_scales_and_keeps_pruned_zeros() -> None:
    generator = torch.Generator().manual_seed(6)
    linear = nn.Linear(96, 24, bias=False)
    linear.weight.data = torch.randn(24, 96, generator=generator) * 0.05
    target = linear.weight.detach().clone()
    linear.weight.data[:, ::4] = 0
    layer = QuantLinear(linear, SPEC, Extras(scale=True))
    layer.mask = linear.weight != 0
    layer.mode = "learned"
    assert layer.scale is not None
    layer.scale.data.copy_(
        METHODS["mse"].round(Stack(weight=linear.weight.data, mask=layer.mask, moments=None), SPEC, RoundingMethod()).scales
    )
    first, before = layer.encoded(), layer.scale.detach().clone()
    optimizer = torch.optim.Adam([{"params": [layer.weight], "lr": 2e-3}, {"params": [layer.scale], "lr": 2e-4}])
    # correlated inputs: with independent ones nothing could be better than the nearest codes
    mixing = torch.randn(24, 96, generator=generator) / 5
    losses = []
    for _ in range(80):
        x = torch.randn(64, 24, generator=generator) @ mixing
        loss = F.mse_loss(layer(x), x @ target.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    last = layer.encoded()
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert set(last.codes.unique().tolist()) == {-1, 0, 1}
    assert not torch.equal(last.codes, first.codes) and not torch.equal(layer.scale, before)
    assert not last.codes[:, ::4].any()
