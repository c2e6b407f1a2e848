"""nf4, fp8, mxfp4 and nvfp4: the reference against a search over the code book in fp64, torch's float8 and other projects' numbers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from decoct.qat.fake_quant import decode, encode, fake_quant, quantize
from decoct.qat.fake_quant.float_reference import E2M1, NF4, nearest_value
from decoct.qat.spec import QuantSpec

SPECS = {
    "nf4": QuantSpec(kind="nf4", group_size=64),
    "nf4-fp32": QuantSpec(kind="nf4", group_size=32, scale_grid="fp32"),
    "fp8-tensor": QuantSpec(kind="fp8_e4m3", bits=8, group_size="tensor"),
    "fp8-channel": QuantSpec(kind="fp8_e4m3", bits=8, group_size="channel", scale_grid="fp32"),
    "mxfp4": QuantSpec(kind="mxfp4", group_size=32),
    "nvfp4": QuantSpec(kind="nvfp4", group_size=16),
}


def e4m3_values() -> np.ndarray:
    """Every non-negative e4m3 number in the order of its code, from the format's definition: bias 7, no infinities."""
    codes = range(0x7F)
    return np.array([(1 + (c & 7) / 8) * 2.0 ** ((c >> 3) - 7) if c >> 3 else (c & 7) / 8 * 2.0**-6 for c in codes])


def search(value: np.ndarray, kind: str) -> np.ndarray:
    """Nearest value of the code book by trying all, in fp64; on a tie the even code (nf4: the lower)."""
    if kind == "nf4":
        distance = np.abs(value[..., None] - np.array(NF4))
        return np.array(NF4)[distance.argmin(-1)]
    table = e4m3_values() if kind == "fp8_e4m3" else np.array(E2M1)
    order = np.array([*range(0, len(table), 2), *range(1, len(table), 2)])
    distance = np.abs(np.abs(value)[..., None] - table[order])
    return np.copysign(table[order][distance.argmin(-1)], value)


def some_weights(rows: int = 6, columns: int = 64, scale: float = 0.05) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) * scale
    weight *= 2.0 ** torch.arange(rows)[:, None]
    weight[1] = 0
    weight[2, :16] = 0
    return weight


def oracle_scales(kept: Tensor, spec: QuantSpec) -> Tensor:
    """What divides, [groups, 1] in fp32, from the formats' definitions."""
    groups = kept.reshape(math.prod(spec.scale_shape(*kept.shape)), -1).numpy()
    absmax = np.abs(groups).max(1, keepdims=True)
    if spec.kind in ("nf4", "fp8_e4m3"):
        scale = torch.from_numpy(absmax / np.float32(448 if spec.kind == "fp8_e4m3" else 1))
        scale = scale if spec.scale_grid == "fp32" else scale.bfloat16().float().clamp(2.0**-17, 65280)
        return scale.masked_fill(torch.from_numpy(absmax == 0), 1.0)
    if spec.kind == "mxfp4":
        return torch.tensor([[2.0 ** max(math.floor(math.log2(a)) - 2, -127) if a else 1.0] for a in absmax[:, 0].tolist()])
    whole = np.float32(2688) / absmax.max()
    wanted = np.clip(absmax / np.float32(6) * whole, 2.0**-9, 448).astype(np.float64)
    stored = np.where(absmax == 0, 1.0, search(wanted, "fp8_e4m3")).astype(np.float32)
    return torch.from_numpy(stored / whole)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("size", [1e-6, 0.05, 30.0])
def test_values_codes_and_gradient_equal_the_search(poisoned: None, name: str, size: float) -> None:
    spec, weight = SPECS[name], some_weights(scale=size)
    limit = {"nf4": 1, "fp8_e4m3": 448}.get(spec.kind, 6)
    for mask in (None, torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.4):
        kept = weight if mask is None else weight * mask
        scale = oracle_scales(kept, spec)
        value = kept.reshape(scale.shape[0], -1) / scale
        codes = search(value.double().clamp(-limit, limit).numpy(), spec.kind)
        expected = (torch.from_numpy(codes).float() * scale).view(weight.shape)
        latent = weight.clone().requires_grad_()
        result = fake_quant(latent, spec, mask=mask)
        (result * torch.arange(1.0, 65.0)).sum().backward()
        assert torch.equal(result, expected)
        assert not torch.signbit(result[result == 0]).any()
        passes = (value.abs() <= limit).view(weight.shape) & (mask is None or mask)  # pyright: ignore
        assert latent.grad is not None
        assert torch.equal(latent.grad, passes * torch.arange(1.0, 65.0))
        encoded = encode(weight, spec, mask=mask)
        assert encoded.codes.dtype == (torch.float8_e4m3fn if spec.kind == "fp8_e4m3" else torch.uint8)
        assert tuple(encoded.scales.shape) == spec.scale_shape(*weight.shape)
        assert (encoded.global_scale is not None) == (spec.kind == "nvfp4")
        assert torch.equal(decode(encoded, spec), result)


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, 32, elements=st.floats(-1, 1, width=32)), st.sampled_from(["nf4", "fp8_e4m3", "mxfp4"]))
def test_nearest_is_the_nearest(values: np.ndarray, kind: str) -> None:
    scaled = values * np.float32({"nf4": 1, "fp8_e4m3": 448, "mxfp4": 6}[kind])
    expected = torch.from_numpy(search(scaled.astype(np.float64), kind)).float()
    assert torch.equal(nearest_value(torch.from_numpy(scaled), kind).abs(), expected.abs())
    assert torch.equal(nearest_value(torch.from_numpy(scaled), kind), expected)


def test_every_tie() -> None:
    for kind, table in (("fp8_e4m3", e4m3_values()), ("mxfp4", np.array(E2M1))):
        middle = (table[1:] + table[:-1]) / 2
        middle = np.concatenate([middle, -middle, np.nextafter(middle.astype(np.float32), np.float32(0)).astype(np.float64)])
        assert torch.equal(nearest_value(torch.from_numpy(middle).float(), kind), torch.from_numpy(search(middle, kind)).float())


def test_mxfp4_scales_are_powers_of_two_down_to_the_smallest() -> None:
    spec = SPECS["mxfp4"]
    tops = torch.tensor([4.0, 7.99, 8.0, 1.0, 2.0**-125, 2.0**-126, 1e-45, 3e38])
    weight = torch.zeros(8, 32)
    weight[:, 3] = tops
    encoded = encode(weight, spec)
    assert encoded.scales.flatten().log2().tolist() == [0, 0, 1, -2, -127, -127, -127, 125]
    # 7.99 is clipped to 6, the largest code
    assert decode(encoded, spec)[1, 3] == 6.0


def test_nf4_equals_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    assert functional.get_4bit_type("nf4", device="cpu").tolist() == pytest.approx(list(NF4), abs=0)
    weight = some_weights(8, 128)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    spec = QuantSpec(kind="nf4", group_size=64, scale_grid="fp32")
    encoded = encode(weight, spec)
    # high nibble first; a zero block has absmax 0 there, 1 here
    theirs = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(8, 128)
    scales = state.absmax.view(8, 2)
    assert torch.equal(encoded.scales[scales > 0], scales[scales > 0])
    assert torch.equal(encoded.codes[weight != 0], theirs[weight != 0])
    assert torch.equal(decode(encoded, spec), functional.dequantize_4bit(packed, state))


def test_nvfp4_equals_compressed_tensors() -> None:
    helpers = pytest.importorskip("compressed_tensors.quantization.utils", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    weight = some_weights(8, 64)
    weight[weight == 0] = 0.01
    arguments = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn)  # type: ignore[call-arg]
    blocks = weight.view(8, 4, 16)
    low, high = blocks.amin(-1), blocks.amax(-1)
    whole = helpers.generate_gparam(weight.min(), weight.max())
    scale, zero = helpers.calculate_qparams(low, high, arguments, global_scale=whole)
    encoded = encode(weight, SPECS["nvfp4"])
    assert encoded.global_scale is not None
    # they multiply by the reciprocal of absmax, which is another number in the last bit
    torch.testing.assert_close(encoded.global_scale.view(-1), whole.view(-1), rtol=2e-7, atol=0)
    assert torch.equal(encoded.scales, scale.float())
    theirs = fake_quantize(weight, scale, zero, arguments, global_scale=whole)
    torch.testing.assert_close(fake_quant(weight, SPECS["nvfp4"]), theirs, rtol=4e-7, atol=0)


def test_mxfp4_and_fp8_equal_compressed_tensors() -> None:
    pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    weight = some_weights(8, 64)
    cases = {
        "mxfp4": QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32),  # type: ignore[call-arg]
        "fp8-channel": QuantizationArgs(num_bits=8, type="float", strategy="channel"),  # type: ignore[call-arg]
        "fp8-tensor": QuantizationArgs(num_bits=8, type="float", strategy="tensor"),  # type: ignore[call-arg]
    }
    for name, arguments in cases.items():
        scales = encode(weight, SPECS[name]).scales
        given = scales.flatten() if name == "fp8-tensor" else scales
        theirs = fake_quantize(weight, given, torch.zeros_like(given), arguments)
        assert torch.equal(fake_quant(weight, SPECS[name]), theirs), name


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_weights_spoil_their_group(name: str, bad: float) -> None:
    spec, weight = SPECS[name], some_weights()
    weight[4, 33] = bad
    result = fake_quant(weight, spec)
    whole = spec.kind == "nvfp4" or spec.group_size == "tensor"
    assert result.isnan().sum() == (weight.numel() if whole else spec.group_width(64))
    assert result[4, 33].isnan()
    with pytest.raises(ValueError, match="groups hold NaN or infinite weights"):
        encode(weight, spec)


@pytest.mark.parametrize("name", SPECS)
def test_dtypes_layouts_zeros_and_compile(name: str) -> None:
    spec, weight = SPECS[name], some_weights()
    expected = fake_quant(weight, spec)
    assert torch.equal(fake_quant(weight.t().contiguous().t(), spec), expected)
    assert torch.equal(torch.compile(lambda w: fake_quant(w, spec), backend="aot_eager", fullgraph=True)(weight), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fake_quant(weight, spec), expected)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        half = weight.to(dtype)
        assert torch.equal(fake_quant(half, spec), fake_quant(half.float(), spec).to(dtype))
    assert not fake_quant(torch.zeros(2, 64), spec).any()
    encoded = encode(torch.zeros(2, 64), spec)
    assert torch.equal(encoded.scales, torch.ones_like(encoded.scales))
    with pytest.raises(ValueError, match=r"are not int8; call encode\(\)"):
        quantize(weight, spec)


@pytest.mark.parametrize("name", SPECS)
def test_operators_are_registered_soundly(name: str) -> None:
    spec, weight = SPECS[name], some_weights()
    shared: Any = spec.group_size == "tensor"
    numbers = (spec.kind, spec.group_width(64))
    torch.library.opcheck(torch.ops.decoct.float_scales.default, (weight, weight > 0, *numbers, shared, [0.0, 2.0**-126, 3e38]))
    scale = torch.ops.decoct.float_scales(weight, None, *numbers, shared, [0.0, 2.0**-126, 3e38])[0]
    operator = torch.ops.decoct.fake_quant_float_reference.default
    torch.library.opcheck(operator, (weight.clone().requires_grad_(), scale, weight > 0, *numbers))
