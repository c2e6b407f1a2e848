"""Linears that round in every forward: their modes, adapters, and layers of fixed codes, against plain formulas in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoct.qat.fake_quant import Encoded, decode, encode, fake_quant, fake_quant_learned
from decoct.qat.layers.codes_linear import CodesLinear
from decoct.qat.layers.quant_linear import Extras, QuantEmbedding, QuantLinear, TiedHead
from decoct.qat.spec import QuantSpec

SPEC = QuantSpec(bits=3, group_size=8)
ASYMMETRIC = QuantSpec(bits=3, group_size=8, symmetric=False)
WHOLE = QuantSpec(bits=4, group_size="tensor")
LATTICES = (SPEC, ASYMMETRIC, WHOLE, QuantSpec(bits=4, group_size="tensor", symmetric=False))
FLOATS = (
    QuantSpec(kind="nf4", group_size=8),
    QuantSpec(kind="fp8_e4m3", bits=8, group_size="channel"),
    QuantSpec(kind="mxfp4", group_size=32),
    QuantSpec(kind="nvfp4", group_size=16),
)


def linear(rows: int = 12, columns: int = 24, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias)


def quant(extras: Extras | None = None, spec: QuantSpec = SPEC) -> QuantLinear:
    made = QuantLinear(linear(), spec, extras)
    if made.scale is not None:
        with torch.no_grad():
            first = encode(made.weight, spec)
            made.scale.copy_(first.scales * 1.25)
            if made.zero is not None and first.zeros is not None:
                made.zero.copy_(first.zeros)
    return made


def test_without_extras_the_parameters_are_those_of_the_linear() -> None:
    plain = linear()
    made = QuantLinear(plain, SPEC)
    assert {name: id(p) for name, p in made.named_parameters()} == {name: id(p) for name, p in plain.named_parameters()}
    assert torch.equal(made.quantized_weight(), fake_quant(plain.weight, SPEC))


@pytest.mark.parametrize("spec", LATTICES)
def test_each_mode_rounds_as_it_says(spec: QuantSpec) -> None:
    made = quant(Extras(scale=True), spec)
    assert made.scale is not None and (made.zero is None) == spec.symmetric
    zeros = encode(made.weight, spec).zeros
    given = fake_quant_learned(made.weight, made.scale, spec, zeros=zeros)
    for mode, wanted in {"off": made.weight, "absmax": fake_quant(made.weight, spec), "learned": given, "fixed": given}.items():
        made.mode = mode  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(made.quantized_weight(), wanted), mode


@pytest.mark.parametrize("mode", ["off", "absmax", "learned", "fixed"])
def test_the_scale_always_has_a_gradient_and_only_a_learned_one_is_not_zero(mode: str) -> None:
    made = quant(Extras(scale=True))
    made.mode = mode  # pyright: ignore[reportAttributeAccessIssue]
    made(torch.randn(5, 24)).square().sum().backward()
    assert made.scale is not None
    assert made.scale.grad is not None and bool(made.scale.grad.any()) == (mode == "learned")
    assert made.weight.grad is not None and made.weight.grad.any()


def test_bits_in_use_may_differ_from_the_lattice_that_is_stored() -> None:
    made = quant(Extras(scale=True))
    made.mode, made.bits = "absmax", 6
    assert torch.equal(made.quantized_weight(), fake_quant(made.weight, SPEC.with_bits(6)))
    codes = made.encoded().codes
    assert int(codes.min()) >= SPEC.qmin and int(codes.max()) <= SPEC.qmax


@pytest.mark.parametrize("spec", LATTICES)
def test_codes_of_a_linear_with_scales_are_its_forward_weight(spec: QuantSpec) -> None:
    made = quant(Extras(scale=True), spec)
    made.mode = "learned"
    assert torch.equal(decode(made.encoded(), spec), made.quantized_weight())
    assert [name for name, p in made.named_parameters() if not p.requires_grad] == ([] if spec.symmetric else ["zero"])


@pytest.mark.parametrize("spec", FLOATS)
def test_kinds_that_are_not_integers_always_take_their_scales_from_the_weight(spec: QuantSpec) -> None:
    made = QuantLinear(linear(columns=32), spec, Extras(scale=True))
    assert made.scale is None and made.zero is None
    for mode in ("absmax", "learned", "fixed"):
        made.mode = mode  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(made.quantized_weight(), fake_quant(made.weight, spec))
    assert torch.equal(decode(made.encoded(), spec), made.quantized_weight())


def test_a_rounded_embedding_and_its_tied_head_see_one_table() -> None:
    torch.manual_seed(0)
    table, head = nn.Embedding(10, 16, padding_idx=3), nn.Linear(16, 10, bias=False)
    head.weight = table.weight
    made = QuantEmbedding(table, SPEC)
    tied = TiedHead(head, made)
    assert tied.weight is made.weight is table.weight and list(tied.children()) == []
    ids, x = torch.tensor([[0, 3, 9]]), torch.randn(2, 16)
    rounded = fake_quant(table.weight, SPEC)
    assert torch.equal(made(ids), rounded[ids]) and torch.equal(tied(x), F.linear(x, rounded))
    (made(ids).sum() + tied(x).sum()).backward()
    again = table.weight.detach().clone().requires_grad_()
    y = fake_quant(again, SPEC)
    (F.embedding(ids, y, 3).sum() + F.linear(x, y).sum()).backward()
    assert table.weight.grad is not None and again.grad is not None
    torch.testing.assert_close(table.weight.grad, again.grad)


def test_an_adapter_starts_as_nothing_and_then_moves_the_rounded_weight_but_no_zero() -> None:
    plain = linear()
    with torch.no_grad():
        plain.weight[:, ::3] = 0.0
    made = QuantLinear(plain, SPEC, Extras(rank=2))
    assert not made.weight.requires_grad
    before = made.quantized_weight().clone()
    assert torch.equal(before, fake_quant(plain.weight, SPEC))
    assert made.adapter_in is not None and made.adapter_out is not None
    with torch.no_grad():
        made.adapter_in.normal_()
        made.adapter_out.normal_(std=0.1)
    merged = plain.weight + (made.adapter_out @ made.adapter_in) * (plain.weight != 0)
    assert torch.equal(made.quantized_weight(), fake_quant(merged, SPEC))
    assert not made.quantized_weight()[:, ::3].any()
    made(torch.randn(3, 24)).sum().backward()
    assert made.adapter_in.grad is not None and made.adapter_in.grad.any() and made.weight.grad is None
    assert torch.equal(decode(made.encoded(), SPEC), made.quantized_weight())


def held(bias: bool = True, spec: QuantSpec = SPEC) -> CodesLinear:
    plain = linear(bias=bias)
    first = encode(plain.weight, spec)
    return CodesLinear(Encoded(first.codes, first.scales * 1.01, first.zeros), plain.bias, spec)


@pytest.mark.parametrize("shape", [(7,), (2, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spec", [SPEC, ASYMMETRIC])
def test_codes_linear_gives_the_product_and_gradients_of_fp64(shape: tuple[int, ...], bias: bool, spec: QuantSpec) -> None:
    made = held(bias, spec)
    x = torch.randn(*shape, 24, requires_grad=True)
    upstream = torch.randn(*shape, 12)
    made(x).backward(upstream)
    from decoct.qat.fake_quant.learned import scale_on_grid

    scale = scale_on_grid(made.scale, SPEC).double().requires_grad_()
    zeros = torch.zeros(12, 3) if made.zero is None else made.zero.double()
    weight = ((made.code.double().view(12, 3, 8) - zeros[:, :, None]) * scale[:, :, None]).view(12, 24)
    again = x.detach().double().requires_grad_()
    b = None if made.bias is None else made.bias.detach().double().requires_grad_()
    F.linear(again, weight, b).backward(upstream.double())
    assert again.grad is not None and scale.grad is not None and made.scale.grad is not None and x.grad is not None
    torch.testing.assert_close(x.grad, again.grad.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.scale.grad, (scale.grad / math.sqrt(8 * SPEC.qmax)).float(), rtol=1e-5, atol=1e-5)
    if b is not None:
        assert made.bias is not None and made.bias.grad is not None and b.grad is not None
        torch.testing.assert_close(made.bias.grad, b.grad.float(), rtol=1e-5, atol=1e-5)


def test_codes_linear_keeps_no_weight_for_the_backward_and_runs_under_autocast() -> None:
    made = held()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        out = made(torch.randn(5, 24, requires_grad=True))
    assert out.dtype == torch.bfloat16
    assert not [t for t in saved if t.dtype.is_floating_point and t.shape == (12, 24)]
    out.sum().backward()
    assert made.scale.grad is not None and made.scale.grad.dtype == torch.float32


def test_codes_linear_refuses_broken_scales() -> None:
    made = held()
    with torch.no_grad():
        made.scale[0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 of 36 scales are NaN or infinite"):
        made.encoded()


def test_a_compiled_layer_takes_the_bits_in_use() -> None:
    module = QuantLinear(nn.Linear(32, 4), QuantSpec(bits=4, group_size=16))
    module.bits = 6
    x = torch.randn(3, 32)
    expected = module(x)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-6)
    module.bits = 4
    assert not torch.allclose(compiled(x), expected, atol=1e-6)
    assert torch.allclose(compiled(x), module(x), atol=1e-6)
