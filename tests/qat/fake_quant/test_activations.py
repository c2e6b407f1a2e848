"""Activations: formulas in numpy, gradients, shapes, static scales, bad numbers; the kernels where they run."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from decoct.qat.fake_quant import ActivationSpec, fake_quant_activation, static_scale

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NUMPY_WARNINGS = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
pytestmark = [NUMPY_WARNINGS] if INTERPRETED else []
SPECS = {
    "int8-dynamic-symmetric": ActivationSpec(),
    "int8-dynamic-asymmetric": ActivationSpec(symmetric=False),
    "int8-static-symmetric": ActivationSpec(scaling="static"),
    "int8-static-asymmetric": ActivationSpec(scaling="static", symmetric=False),
    "int8-outliers": ActivationSpec(outliers=1.5),
    "fp8-dynamic": ActivationSpec(kind="fp8_e4m3"),
    "fp8-static": ActivationSpec(kind="fp8_e4m3", scaling="static"),
}


def some_activations(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1.0, 30.0])[:, None]
    x[0, 1] = 0
    return (x + 0.3 * x.abs()).to(dtype)


def given(x: Tensor, spec: ActivationSpec) -> dict[str, Any]:
    """Scale and zero point of 80 % of the range, so that some values are clipped; nothing for dynamic scaling."""
    if spec.scaling == "dynamic":
        return {}
    scale, zero = static_scale(0.8 * x.float().amin(), 0.8 * x.float().amax(), spec)
    return {"scale": scale, "zero": zero}


def by_formula(x: Tensor, spec: ActivationSpec, scale: Tensor | None = None, zero: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(values, where the gradient passes), in numpy's fp32."""
    if spec.outliers is not None:
        large = x.float().abs() >= spec.outliers
        assert 0 < int(large.sum()) < large.numel() / 2
        others, passes = by_formula(x.masked_fill(large, 0), ActivationSpec())
        return torch.where(large, x.float(), others), passes | large
    rows = x.float().numpy()
    low, high = np.minimum(rows.min(-1, keepdims=True), 0), np.maximum(rows.max(-1, keepdims=True), 0)
    peak = np.maximum(-low, high)
    if spec.kind == "fp8_e4m3":
        s = np.where(peak == 0, 1, peak / np.float32(448)) if scale is None else scale.numpy()
        v = rows / s.astype(np.float32)
        codes = torch.from_numpy(v.clip(-448, 448)).to(torch.float8_e4m3fn).float().numpy()
        return torch.from_numpy(codes * s), torch.from_numpy(np.abs(v) <= 448)
    step = peak / np.float32(127) if spec.symmetric else (high - low) / np.float32(255)
    s = np.where(step == 0, 1, step).astype(np.float32) if scale is None else scale.numpy()
    if spec.symmetric:
        z = np.float32(0)
    else:
        z = np.rint(np.clip(-128 - low / s, -128, 127)) if zero is None else zero.numpy().astype(np.float32)
    v = rows / s
    return torch.from_numpy((np.clip(np.rint(v) + z, -128, 127) - z) * s), torch.from_numpy((v >= -128 - z) & (v <= 127 - z))


@pytest.mark.parametrize("name", SPECS)
def test_values_and_gradient_equal_the_formula(poisoned: None, name: str) -> None:
    spec, x = SPECS[name], some_activations()
    numbers = given(x, spec)
    values, passes = by_formula(x, spec, **numbers)
    latent = x.clone().requires_grad_()
    result = fake_quant_activation(latent, spec, **numbers)
    (result * torch.arange(1.0, 41.0)).sum().backward()
    assert torch.equal(result, values + 0.0)
    assert latent.grad is not None
    assert torch.equal(latent.grad, passes * torch.arange(1.0, 41.0))
    assert spec.scaling == "dynamic" or not bool(passes.all())


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_give_the_same_bits(poisoned: None, same_bits: Callable[..., None], name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = "cpu" if INTERPRETED else "cuda"
    spec, x = SPECS[name], some_activations(dtype).to(device)
    x[1, 2, 3] = float("nan")
    numbers = {key: None if value is None else value.to(device) for key, value in given(some_activations(dtype), spec).items()}
    got = []
    for backend in ("triton", "reference"):
        latent = x.clone().requires_grad_()
        result = fake_quant_activation(latent, spec, backend=backend, **numbers)
        (result * torch.arange(1.0, 41.0, device=device).to(dtype)).sum().backward()
        assert latent.grad is not None
        got.append((result.detach(), latent.grad))
    same_bits("values", got[0][0], got[1][0])
    same_bits("gradient", got[0][1], got[1][1])


@pytest.mark.parametrize("name", SPECS)
def test_shapes_layouts_autocast_compile_and_checkpointing(name: str) -> None:
    spec, x = SPECS[name], some_activations()
    numbers = given(x, spec)
    expected = fake_quant_activation(x, spec, **numbers)
    keys = x.view(2, 3, 5, 8).transpose(1, 2)
    assert torch.equal(fake_quant_activation(keys, spec, **numbers), fake_quant_activation(keys.contiguous(), spec, **numbers))
    assert torch.equal(fake_quant_activation(x[1, 1], spec, **numbers), expected[1, 1])
    assert fake_quant_activation(x.bfloat16(), spec, **numbers).dtype == torch.bfloat16
    assert fake_quant_activation(x[:, :0], spec, **numbers).shape == (2, 0, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fake_quant_activation(x, spec, **numbers), expected)

    def loss(values: Tensor) -> Tensor:
        return fake_quant_activation(values, spec, **numbers).square().sum()

    grads = []
    for call in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True), lambda v: checkpoint(loss, v, use_reentrant=False)):
        latent = x.clone().requires_grad_()
        value = call(latent)
        assert isinstance(value, Tensor)
        value.backward()
        grads.append(latent.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_static_scales() -> None:
    low, high = torch.tensor(-1.0), torch.tensor(3.0)
    assert static_scale(low, high, ActivationSpec(scaling="static")) == (torch.tensor(3.0) / 127, None)
    scale, zero = static_scale(low, high, ActivationSpec(scaling="static", symmetric=False))
    assert zero is not None
    assert (scale.item(), zero.item()) == (pytest.approx(4 / 255), -64)
    assert static_scale(low, high, SPECS["fp8-static"])[0] == torch.tensor(3.0) / 448
    # a range that leaves zero out is widened to hold it; an empty one has scale 1
    wide, zero = static_scale(torch.tensor(2.0), high, ActivationSpec(scaling="static", symmetric=False))
    assert zero is not None
    assert (wide.item(), zero.item()) == (pytest.approx(3 / 255), -128)
    assert static_scale(torch.tensor(0.0), torch.tensor(0.0), ActivationSpec())[0] == 1
    assert static_scale(low, torch.tensor(float("nan")), ActivationSpec())[0].isnan()


def test_bad_values_spoil_their_token() -> None:
    for name, spec in SPECS.items():
        x = some_activations()
        numbers = given(x, spec)
        x[1, 2, 3] = float("inf")
        result = fake_quant_activation(x, spec, **numbers)
        spoilt = 40 if spec.scaling == "dynamic" else 1
        if spec.outliers is not None:
            # the other outliers of the token stay what they are
            spoilt -= int((x[1, 2].abs() >= spec.outliers).sum()) - 1
        assert result.isnan().sum() == spoilt, name
        assert result[1, 2, 3].isnan()


@pytest.mark.parametrize(
    ("spec", "numbers", "words"),
    [
        ({"scaling": "static"}, {}, r"needs a scale: fp32, one number, as static_scale\(\)"),
        ({"scaling": "static"}, {"scale": torch.ones(2)}, r"one float32 number on cpu; got torch.float32 of \(2,\)"),
        ({"scaling": "static"}, {"scale": torch.ones(1).bfloat16()}, "got torch.bfloat16"),
        ({"scaling": "static", "symmetric": False}, {"scale": torch.ones(1)}, "symmetric=false: give zero"),
        ({"scaling": "static"}, {"scale": torch.ones(1), "zero": torch.ones(1).char()}, "symmetric=true: leave zero out"),
        ({}, {"scale": torch.ones(1)}, "scaling='dynamic' takes scales from the values"),
    ],
)
def test_bad_arguments_are_named(spec: dict[str, Any], numbers: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fake_quant_activation(torch.ones(2, 8), ActivationSpec(**spec), **numbers)
    with pytest.raises(ValueError, match="activations must be floating point"):
        fake_quant_activation(torch.ones(2, 8).int(), ActivationSpec())


BLOCKS = {"mxfp4": ActivationSpec(kind="mxfp4"), "nvfp4": ActivationSpec(kind="nvfp4", scaling="static")}
_MAGNITUDES = np.array([0, 1, 2, 4, 0.5, 1.5, 3, 6], np.float32)  # even codes first: argmin takes the first of equals


def wide_activations(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.01, 1.0, 30.0])[:, None]
    x[0, 1, :32] = 0
    x[1, 2, :8] = torch.tensor([1.25, 2.5, 5.0, -0.25, 6.0, -7.0, 1.75, 0.75])  # halves between codes under a scale of 1
    return x.to(dtype)


def of_blocks(x: Tensor, spec: ActivationSpec, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(values, where the gradient passes), in numpy's fp32, group by group."""
    groups = x.float().numpy().reshape(-1, 32 if scale is None else 16)
    peak = np.abs(groups).max(-1, keepdims=True)
    if scale is None:
        s = np.where(peak == 0, 1, np.exp2(np.floor(np.log2(np.where(peak == 0, 4, peak))) - 2)).astype(np.float32)
    else:
        wanted = torch.from_numpy(peak / np.float32(6)) * scale
        stored = wanted.clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float().numpy()
        s = np.where(peak == 0, 1, stored).astype(np.float32) / scale.numpy()
    v = groups / s
    nearest = _MAGNITUDES[np.abs(np.abs(v).clip(max=6)[..., None] - _MAGNITUDES).argmin(-1)]
    return torch.from_numpy(np.copysign(nearest, v) * s).view(x.shape), torch.from_numpy(np.abs(v) <= 6).view(x.shape)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_4_bit_floats_equal_the_formula(poisoned: None, name: str) -> None:
    spec, x = BLOCKS[name], wide_activations()
    numbers: dict[str, Any] = {} if name == "mxfp4" else {"scale": static_scale(0.8 * x.amin(), 0.8 * x.amax(), spec)[0]}
    values, passes = of_blocks(x, spec, **numbers)
    latent = x.clone().requires_grad_()
    result = fake_quant_activation(latent, spec, **numbers)
    (result * torch.arange(1.0, 65.0)).sum().backward()
    assert torch.equal(result, values + 0.0)
    assert latent.grad is not None
    assert torch.equal(latent.grad, passes * torch.arange(1.0, 65.0))
    # a wrong value spoils its group alone
    x[1, 2, 3] = float("inf")
    assert fake_quant_activation(x, spec, **numbers).isnan().sum() == (32 if name == "mxfp4" else 16)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_of_blocks_give_the_same_bits(poisoned: None, same_bits: Callable[..., None], name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = "cpu" if INTERPRETED else "cuda"
    spec, x = BLOCKS[name], wide_activations(dtype).to(device)
    numbers: dict[str, Any] = {} if name == "mxfp4" else {"scale": static_scale(0.8 * x.float().amin(), 0.8 * x.float().amax(), spec)[0]}
    x[1, 2, 3] = float("nan")
    got = []
    for backend in ("triton", "reference"):
        latent = x.clone().requires_grad_()
        result = fake_quant_activation(latent, spec, backend=backend, **numbers)
        (result * torch.arange(1.0, 65.0, device=device).to(dtype)).sum().backward()
        assert latent.grad is not None
        got.append((result.detach(), latent.grad))
    same_bits("values", got[0][0], got[1][0])
    same_bits("gradient", got[0][1], got[1][1])


def test_blocks_have_one_scaling_and_divide_the_features() -> None:
    assert static_scale(torch.tensor(-4.0), torch.tensor(3.0), BLOCKS["nvfp4"])[0] == 448 * 6 / 4
    for kind, other, only in (("mxfp4", "static", "dynamic"), ("nvfp4", "dynamic", "static")):
        with pytest.raises(ValueError, match=f"kind='{kind}' has scaling='{only}', not '{other}'; write scaling: {only}"):
            ActivationSpec(kind=kind, scaling=other)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="group_size=32 does not divide in_features=40"):
        fake_quant_activation(torch.ones(2, 40), BLOCKS["mxfp4"])
