"""Ranges by the kernel equal those of the reference bit for bit, on a GPU or, with TRITON_INTERPRET=1, on the CPU."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from decoct.qat.fake_quant import encode, fake_quant
from decoct.qat.spec import QuantSpec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
NUMPY_WARNINGS = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
pytestmark = [NUMPY_WARNINGS] if INTERPRETED else [pytest.mark.gpu]

SameBits = Callable[[str, Tensor, Tensor], None]
FORMS: list[Any] = [(False, 16), (False, "channel"), (False, "tensor"), (True, "tensor")]


def check(same_bits: SameBits, weight: Tensor, spec: QuantSpec, mask: Tensor | None = None) -> None:
    weight, mask = weight.to(DEVICE), None if mask is None else mask.to(DEVICE)
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)).to(weight)
    got: dict[str, list[Tensor]] = {}
    for backend in ("reference", "triton"):
        latent = weight.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        result = fake_quant(latent, spec, mask=mask, backend=backend)
        (result * upstream).sum().backward()
        assert latent.grad is not None
        got[backend] = [result.detach(), latent.grad]
        if weight.isfinite().all():
            got[backend] += [part for part in encode(weight, spec, mask=mask, backend=backend) if isinstance(part, Tensor)]
    for kernel, reference in zip(got["triton"], got["reference"]):
        same_bits("values, gradient, codes, scales, zeros", kernel, reference)


def some_weights(rows: int, columns: int, size: float) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)) * size
    weight += torch.arange(rows)[:, None] * size * 0.7
    weight[rows // 2] = 0
    weight[-1] = -weight[-1].abs()
    return weight


@pytest.mark.parametrize(("symmetric", "group"), FORMS)
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_bits(poisoned: None, same_bits: SameBits, dtype: torch.dtype, bits: int, symmetric: bool, group: Any) -> None:
    for size in (1e-39, 1e-4, 0.05, 1e4):
        weight = some_weights(7, 48, size).to(dtype)
        check(same_bits, weight, QuantSpec(bits=bits, group_size=group, symmetric=symmetric))
        check(same_bits, weight, QuantSpec(bits=bits, group_size=group, symmetric=symmetric, scale_grid="fp32"), weight > 0)


@pytest.mark.parametrize(("symmetric", "group"), FORMS)
def test_wide_odd_strided_and_bad(poisoned: None, same_bits: SameBits, symmetric: bool, group: Any) -> None:
    spec = QuantSpec(bits=4, group_size=group, symmetric=symmetric)
    if group != 16:
        check(same_bits, some_weights(3, 2051, 0.1), spec)
        check(same_bits, some_weights(3, 33, 0.1), spec)
    check(same_bits, some_weights(48, 6, 0.1).t(), spec, torch.rand(48, 6).t() > 0.5)
    for bad in (float("nan"), -float("nan"), float("inf"), float("-inf")):
        weight = some_weights(4, 64, 0.1)
        weight[3, 20] = bad
        check(same_bits, weight, spec)


def test_operator_is_registered_soundly() -> None:
    weight = some_weights(4, 32, 0.1).to(DEVICE)
    fake_quant(weight, QuantSpec(group_size=16, symmetric=False), backend="triton")
    for shared in (False, True):
        arguments = (weight, weight > 0, 4, 16, shared, False, 15.0, [16.0, 2.0**-17, 65280.0])
        torch.library.opcheck(torch.ops.decoct.range_grid_triton.default, arguments)
