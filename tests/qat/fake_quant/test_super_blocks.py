"""q2_k to q6_k: scales, codes and gradients against the formulas, written out sub-block by sub-block in numpy."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoct.qat.codes.code_checks import grid_problem
from decoct.qat.fake_quant import Encoded, decode, encode, fake_quant, quantize
from decoct.qat.scheme import SpecChange
from decoct.qat.spec import QuantSpec

KINDS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
SIGNED = ("q3_k", "q6_k")
# kind -> (bits, weights per sub-block, largest sub-scale), from ggml-common.h
LAYOUT = {"q2_k": (2, 16, 15), "q3_k": (3, 16, 31), "q4_k": (4, 32, 63), "q5_k": (5, 32, 63), "q6_k": (6, 16, 127)}


def some_weights(rows: int = 7, columns: int = 512) -> Tensor:
    """Random rows of several sizes, and rows without a positive, without a negative and without any weight."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) * 0.05
    weight *= 4.0 ** torch.arange(rows)[:, None]
    weight[1], weight[2], weight[3] = weight[1].abs(), -weight[2].abs(), 0
    weight[4, :32] = 0
    weight[5, :256] = 0
    return weight


def fp16(number: float) -> np.float32:
    return np.float32(np.float16(min(max(number, 2.0**-24), 65504.0)))


def by_hand(block: NDArray[np.float32], kind: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(values, where the gradient passes) of one super-block of 256 weights."""
    bits, width, most = LAYOUT[kind]
    subs = block.reshape(-1, width)
    signed = kind in SIGNED
    low = np.minimum(subs.min(1), 0) if not signed else np.zeros(len(subs), np.float32)
    if signed:
        extreme = np.array([sub.max() if sub.max() >= -sub.min() else sub.min() for sub in subs], np.float32)
        wanted = extreme / np.float32(-(2 ** (bits - 1)))
    else:
        wanted = (np.maximum(subs.max(1), 0) - low) / np.float32(2**bits - 1)
    largest = np.abs(wanted).max()
    d = fp16(largest / np.float32(most)) if largest else np.float32(1)
    dmin = fp16((-low).max() / np.float32(most)) if low.any() else np.float32(0)
    values, passes = np.empty_like(subs), np.empty(subs.shape, bool)
    least, greatest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    for index, sub in enumerate(subs):
        count = min(max(abs(float(np.rint(wanted[index] / d))), 1), most)
        step = d * np.float32(math.copysign(count, wanted[index]) if wanted[index] else 1)
        deep = dmin * np.float32(min(float(np.rint(-low[index] / dmin)), most) if dmin else 0)
        free = np.rint((sub + deep) / step)
        codes = np.clip(free, least, greatest)
        values[index], passes[index] = codes * step - deep, codes == free
    return values.reshape(-1), passes.reshape(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_values_codes_and_gradient_equal_the_formulas(kind: str) -> None:
    spec, weight = QuantSpec(kind=kind), some_weights()  # pyright: ignore[reportArgumentType]
    found = [by_hand(block, kind) for block in weight.numpy().reshape(-1, 256)]
    expected = torch.from_numpy(np.concatenate([values for values, _ in found])).view(weight.shape)
    passes = torch.from_numpy(np.concatenate([one for _, one in found])).view(weight.shape)
    latent, along = weight.clone().requires_grad_(), torch.arange(1.0, 513.0)
    result = fake_quant(latent, spec)
    (result * along).sum().backward()
    assert torch.equal(result, expected)
    assert latent.grad is not None
    assert torch.equal(latent.grad, passes * along)
    encoded = encode(weight, spec)
    assert torch.equal(decode(encoded, spec), result)
    assert grid_problem(encoded, spec) is None
    # a step of the largest sub-scale is what the code book can be off by, about a sub-scale for weights that are clipped
    assert float((result.detach() - weight).norm() / weight.norm()) < {2: 0.4, 3: 0.2, 4: 0.1, 5: 0.06, 6: 0.03}[spec.bits]


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_weights_are_computed_in_fp32(kind: str) -> None:
    spec, weight = QuantSpec(kind=kind), some_weights().bfloat16()  # pyright: ignore[reportArgumentType]
    assert torch.equal(fake_quant(weight, spec), fake_quant(weight.float(), spec).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_not_finite_spoils_its_super_block(kind: str) -> None:
    spec = QuantSpec(kind=kind)  # pyright: ignore[reportArgumentType]
    for bad in (math.nan, math.inf, -math.inf):
        weight = some_weights()
        weight[0, 300] = bad
        result = fake_quant(weight, spec)
        assert result[0, 256:].isnan().all()
        assert result.isnan().sum() == 256
        with pytest.raises(ValueError, match="NaN or infinite"):
            encode(weight, spec)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_weights_stay_zero_or_are_refused(kind: str) -> None:
    spec, weight = QuantSpec(kind=kind), some_weights()  # pyright: ignore[reportArgumentType]
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    if kind not in SIGNED:
        with pytest.raises(ValueError, match="has minimums, so pruned weights would not stay zero; use q3_k or q6_k, or kind: int"):
            fake_quant(weight, spec, mask=mask)
        return
    latent = weight.clone().requires_grad_()
    result = fake_quant(latent, spec, mask=mask)
    result.sum().backward()
    assert torch.equal(result, fake_quant(weight * mask, spec))
    assert not result[~mask].any()
    assert latent.grad is not None
    assert not latent.grad[~mask].any()


def test_there_is_no_kernel_and_no_int8_pair() -> None:
    weight, spec = some_weights(), QuantSpec(kind="q4_k")
    with pytest.raises(ValueError, match="has no kernel for kind='q4_k'; use backend='auto'"):
        fake_quant(weight, spec, backend="triton")
    with pytest.raises(ValueError, match=r"come with sub-scales; call encode\(\)"):
        quantize(weight, spec)


def test_the_kind_implies_bits_and_group_size() -> None:
    assert {kind: QuantSpec(kind=kind).bits for kind in KINDS} == {kind: LAYOUT[kind][0] for kind in KINDS}  # pyright: ignore[reportArgumentType]
    assert {QuantSpec(kind=kind).group_size for kind in KINDS} == {256}  # pyright: ignore[reportArgumentType]
    assert QuantSpec.from_json(QuantSpec(kind="q6_k").to_json()) == QuantSpec(kind="q6_k")
    assert SpecChange(kind="q6_k").applied(QuantSpec(bits=8, group_size=64)) == QuantSpec(kind="q6_k")
    assert SpecChange(kind="int", bits=5, group_size=32).applied(QuantSpec(kind="q4_k")) == QuantSpec(bits=5, group_size=32)
    assert QuantSpec(kind="q4_k").words() == "q4_k"
    with pytest.raises(ValueError, match="codes of 4 bits, not 8"):
        QuantSpec(kind="q4_k", bits=8)
    with pytest.raises(ValueError, match="does not take group_size=64; use group_size=256"):
        QuantSpec(kind="q4_k", group_size=64)
    with pytest.raises(ValueError, match="has no zero point"):
        QuantSpec(kind="q4_k", symmetric=False)


def test_a_width_of_no_whole_blocks_is_refused_with_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"do not divide in_features=576; give such modules \{kind: int, bits: 5, group_size: 32\}"):
        fake_quant(torch.zeros(2, 576), QuantSpec(kind="q4_k"))
    assert fake_quant(torch.zeros(2, 576), SpecChange(kind="int", bits=5, group_size=32).applied(QuantSpec(kind="q4_k"))).shape == (2, 576)


@pytest.mark.parametrize("kind", ["q4_k", "q6_k"])
def test_damaged_sub_scales_are_named(kind: str) -> None:
    spec = QuantSpec(kind=kind)  # pyright: ignore[reportArgumentType]
    encoded = encode(some_weights(), spec)
    sub = encoded.sub
    assert sub is not None
    cases = [
        (encoded._replace(sub=None), "sub-scales are missing"),
        (encoded._replace(scales=encoded.scales * 1.0001), "not on the grid"),
        (encoded._replace(sub=sub._replace(scales=sub.scales[:, 1:])), "sub-scales are torch.int8 of shape"),
        (encoded._replace(codes=encoded.codes + 60), "codes span"),
    ]
    if kind == "q4_k":
        assert sub.minimum is not None
        cases += [
            (encoded._replace(sub=sub._replace(minimum=None)), "minimums are missing"),
            (encoded._replace(sub=sub._replace(minimum=-1 - sub.minimum)), "of at least 0"),
            (encoded._replace(sub=sub._replace(scales=sub.scales + 60)), "sub-scales span"),
            (encoded._replace(sub=sub._replace(minimums=sub.scales - 64)), "sub-minimums span"),
        ]
    for damaged, problem in cases:
        assert problem in str(grid_problem(damaged, spec))
    assert "sub-scales are stored" in str(
        grid_problem(Encoded(encoded.codes * 0, torch.ones_like(encoded.scales), sub=sub), QuantSpec(group_size=256))
    )
