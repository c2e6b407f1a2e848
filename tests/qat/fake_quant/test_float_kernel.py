"""Small floats and quantiles by the kernel equal the reference bit for bit, on a GPU or, with TRITON_INTERPRET=1, on the CPU."""

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from decoct.qat.fake_quant import fake_quant
from decoct.qat.fake_quant.float_reference import NF4_MIDPOINTS
from decoct.qat.fake_quant.floats import fake_quant_float
from decoct.qat.spec import QuantSpec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
NUMPY_WARNINGS = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
pytestmark = [NUMPY_WARNINGS] if INTERPRETED else [pytest.mark.gpu]

SameBits = Callable[[str, Tensor, Tensor], None]
SPECS = {
    "nf4": QuantSpec(kind="nf4", group_size=48),
    "fp8-tensor": QuantSpec(kind="fp8_e4m3", bits=8, group_size="tensor"),
    "fp8-channel": QuantSpec(kind="fp8_e4m3", bits=8, group_size="channel", scale_grid="fp32"),
    "mxfp4": QuantSpec(kind="mxfp4", group_size=32),
    "nvfp4": QuantSpec(kind="nvfp4", group_size=16),
}


def check(same_bits: SameBits, op: Callable[[Tensor, Any], Tensor], weight: Tensor) -> None:
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)).to(weight)
    got = []
    for backend in ("triton", "reference"):
        latent = weight.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        result = op(latent, backend)
        (result * upstream).sum().backward()
        assert latent.grad is not None
        got.append((result.detach(), latent.grad))
    same_bits("values", got[0][0], got[1][0])
    same_bits("gradient", got[0][1], got[1][1])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_bits(poisoned: None, same_bits: SameBits, name: str, dtype: torch.dtype) -> None:
    for size in (1e-39, 1e-4, 0.05, 1e4):
        weight = (torch.randn(7, 96, generator=torch.Generator().manual_seed(1)) * size).to(dtype)
        weight[3] = 0
        weight[4, 5] = float("nan") if size == 0.05 else 0.0
        weight[5, 5] = float("inf") if size == 1e-4 else 0.0
        for mask in (None, torch.rand(7, 96, generator=torch.Generator().manual_seed(2)).to(DEVICE) > 0.5):
            check(same_bits, lambda w, b, m=mask: fake_quant(w, SPECS[name], mask=m, backend=b), weight.to(DEVICE))


@pytest.mark.parametrize("kind", ["nf4", "fp8_e4m3", "mxfp4"])
def test_every_tie_and_limit(same_bits: SameBits, kind: str) -> None:
    if kind == "fp8_e4m3":
        every = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
        points = [(low + high) / 2 for low, high in pairwise(every)] + [448.0, 448.01, 1e9]
    elif kind == "nf4":
        points = [*NF4_MIDPOINTS, 1.0, 1.0000001]
    else:
        points = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 6.000001, 7.0]
    middle = torch.tensor(points)
    near = torch.cat([middle, torch.nextafter(middle, torch.tensor(0.0)), torch.nextafter(middle, torch.tensor(1e9))])
    weight = torch.cat([near, -near])[None].to(DEVICE)
    scale = torch.ones(1, 1, device=DEVICE)
    check(same_bits, lambda w, b: fake_quant_float(w, scale, None, kind, w.shape[1], b), weight)


def test_wide_strided_overflowing_and_empty(poisoned: None, same_bits: SameBits) -> None:
    for name in ("fp8-channel", "fp8-tensor"):
        for shape in ((3, 2051), (3, 33)):
            check(same_bits, lambda w, b, n=name: fake_quant(w, SPECS[n], backend=b), torch.randn(shape).to(DEVICE))
    weight = torch.randn(96, 6).t().to(DEVICE)
    assert not weight.is_contiguous()
    check(same_bits, lambda w, b: fake_quant(w, SPECS["mxfp4"], backend=b), weight)
    # a given scale may be so small that the quotient overflows, or be broken
    scale = torch.tensor([[1e-3], [1e-38], [float("nan")], [float("inf")]], device=DEVICE)
    check(same_bits, lambda w, b: fake_quant_float(w, scale, None, "fp8_e4m3", 32, b), (torch.randn(4, 32) * 1e20).to(DEVICE))
    assert fake_quant(torch.zeros(0, 32, device=DEVICE), SPECS["mxfp4"], backend="triton").shape == (0, 32)


def test_operators_are_registered_soundly() -> None:
    weight, scale = torch.randn(4, 32, device=DEVICE), torch.ones(4, 1, device=DEVICE)
    fake_quant(weight, SPECS["mxfp4"], backend="triton")
    rest = (scale, weight > 0, "mxfp4", 32)
    torch.library.opcheck(torch.ops.decoct.fake_quant_float_triton.default, (weight.clone().requires_grad_(), *rest))
    torch.library.opcheck(torch.ops.decoct.fake_quant_float_triton_gradient.default, (torch.ones_like(weight), weight, *rest))
