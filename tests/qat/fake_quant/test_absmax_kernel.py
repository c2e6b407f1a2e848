"""The Triton kernels equal the reference bit for bit.

With TRITON_INTERPRET=1 the tests run on the CPU: ``test_interpreter.py`` starts a process of its own for that, because the
variable counts when triton is first imported. Otherwise they need a CUDA device.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from decoct.qat.fake_quant import fake_quant, quantize
from decoct.qat.spec import QuantSpec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# numpy, which the interpreter computes with, warns where IEEE arithmetic gives infinities and NaN
NUMPY_WARNINGS = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
pytestmark = [NUMPY_WARNINGS] if INTERPRETED else [pytest.mark.gpu]


def same_bits(name: str, got: Tensor, expected: Tensor) -> None:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
    # which NaN is written is nobody's business
    differs = (got.view(integers) != expected.view(integers)) & ~(got.isnan() & expected.isnan())
    worst = (got.double() - expected.double()).abs().nan_to_num().max()
    assert not differs.any(), f"{name} {tuple(got.shape)}: {int(differs.sum())} elements differ, by {worst:.3e} at most"


def check(weight: Tensor, spec: QuantSpec, mask: Tensor | None = None) -> None:
    """Values, gradient, codes and scales of both back ends."""
    weight, mask = weight.to(DEVICE), None if mask is None else mask.to(DEVICE)
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)).to(weight)
    got: dict[str, list[Tensor]] = {}
    for backend in ("reference", "triton"):
        latent = weight.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        result = fake_quant(latent, spec, mask=mask, backend=backend)
        ((result * upstream).sum() * 2).backward()
        assert latent.grad is not None
        got[backend] = [result.detach(), latent.grad]
        if weight.isfinite().all():
            got[backend] += quantize(weight, spec, mask=mask, backend=backend)
    for name, kernel, reference in zip(("values", "gradient", "codes", "scales"), got["triton"], got["reference"]):
        same_bits(name, kernel, reference)


def some_weights(rows: int, columns: int, scale: float = 0.05) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)) * scale
    weight[rows // 2] = 0
    return weight


# rows x columns of 7 x 96 in groups of 32 are 21 groups, no multiple of a block; 33 and 48 are no powers of two
@pytest.mark.parametrize(("rows", "columns", "group"), [(7, 96, 32), (5, 48, 16), (3, 33, "channel"), (3, 96, 48), (1, 16, 16)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_groups_and_odd_sizes(poisoned: None, bits: int, rows: int, columns: int, group: Any) -> None:
    weight = some_weights(rows, columns)
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) > 0.5
    check(weight, QuantSpec(bits=bits, group_size=group))
    check(weight, QuantSpec(bits=bits, group_size=group), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-40, 1e-6, 1e-3, 1e3, 1e37])
def test_dtypes_tiny_and_large_weights(poisoned: None, dtype: torch.dtype, scale: float) -> None:
    weight = some_weights(5, 64, scale).to(dtype)
    check(weight, QuantSpec(bits=4, group_size=32))
    check(weight, QuantSpec(bits=8, group_size=32), weight > 0)


@pytest.mark.parametrize("grid", ["bf16_fp16", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("divisor", ["half_range", "qmax", "full_range"])
def test_grids_and_divisors(grid: Any, divisor: Any) -> None:
    for scale in (1e-39, 1e-4, 0.05, 1e5):
        check(some_weights(4, 64, scale), QuantSpec(bits=3, group_size=16, scale_grid=grid, divisor=divisor))


def test_groups_wider_than_a_block(poisoned: None) -> None:
    weight = some_weights(2, 4100)
    check(weight, QuantSpec(bits=4, group_size="channel"))
    check(weight, QuantSpec(bits=4, group_size="channel"), weight > 0)


def test_more_groups_than_a_program_takes(poisoned: None) -> None:
    check(some_weights(70, 64), QuantSpec(bits=4, group_size=16))


def test_ties_and_limits() -> None:
    weight = torch.tensor([[-7.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 6.5, 7.0, 7.0000005, 7.49, 7.5, -7.25, 0.0, -0.0]])
    check(weight, QuantSpec(bits=4, group_size=16))
    check(torch.tensor([[-8.01, 1.0]]), QuantSpec(bits=4, group_size=2, divisor="full_range"))


def test_ties_and_limits_of_ternary_codes() -> None:
    weight = torch.arange(-48, 48).float().mul(0.125).view(3, 32)
    assert set(quantize(weight, QuantSpec(ternary=True, group_size=16))[0].unique().tolist()) == {-1, 0, 1}
    for divisor in ("half_range", "qmax", "full_range"):
        check(weight, QuantSpec(ternary=True, group_size=16, divisor=divisor))


def test_every_tie_of_the_scale_grid() -> None:
    # absmax halfway between neighbouring bf16 numbers, with even and odd lower neighbours (qmax at 2 bits divides by 1)
    bits = (torch.arange(0x3F00, 0x3F20, dtype=torch.int32) << 16) + 0x8000
    halfway = bits.view(torch.float32)
    near = torch.stack([halfway, torch.nextafter(halfway, torch.tensor(0.0)), torch.nextafter(halfway, torch.tensor(9.0))], 1)
    weight = torch.zeros(96, 4)
    weight[:, 0] = near.flatten()
    check(weight, QuantSpec(bits=2, group_size=4, divisor="qmax"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_weights_spoil_their_group(bad: float, dtype: torch.dtype) -> None:
    weight = some_weights(4, 64).to(dtype)
    weight[3, 20] = bad
    check(weight, QuantSpec(bits=4, group_size=16))
    mask = torch.ones(4, 64, dtype=torch.bool)
    mask[3, 20] = False
    check(weight, QuantSpec(bits=4, group_size=16), mask)
    assert fake_quant(weight.to(DEVICE), QuantSpec(group_size=16), backend="triton").isnan().sum() == 16
    with pytest.raises(ValueError, match="1 of 16 groups hold NaN or infinite weights, first row 3 group 1"):
        quantize(weight.to(DEVICE), QuantSpec(group_size=16), backend="triton")


def test_non_contiguous() -> None:
    weight = some_weights(32, 6).t()
    mask = torch.rand(32, 6, generator=torch.Generator().manual_seed(1)).t() > 0.5
    assert not weight.is_contiguous()
    check(weight, QuantSpec(bits=4, group_size=16), mask)


def test_empty() -> None:
    assert fake_quant(torch.zeros(0, 32, device=DEVICE), QuantSpec(group_size=16), backend="triton").shape == (0, 32)


def test_operators_are_registered_soundly() -> None:
    weight = some_weights(4, 32).to(DEVICE)
    arguments = (weight > 0, 4, 16, 7.5, [16.0, 2.0**-17, 65280.0])
    fake_quant(weight, QuantSpec(group_size=16), backend="triton")
    torch.library.opcheck(torch.ops.decoct.fake_quant_triton.default, (weight.clone().requires_grad_(), *arguments))
    torch.library.opcheck(torch.ops.decoct.fake_quant_triton_gradient.default, (torch.ones_like(weight), weight, *arguments))


def test_compiled_equals_eager() -> None:
    weight = some_weights(4, 32).to(DEVICE)

    def value(latent: Tensor) -> Tensor:
        return fake_quant(latent, QuantSpec(group_size=16), backend="triton").square().sum()

    eager, compiled = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    value(eager).backward()
    torch.compile(value, backend="aot_eager", fullgraph=True)(compiled).backward()
    assert eager.grad is not None
    assert compiled.grad is not None
    same_bits("gradient", compiled.grad, eager.grad)


@pytest.mark.skipif(INTERPRETED, reason="what 'auto' takes on a GPU")
def test_auto_takes_the_kernel_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from decoct.qat.fake_quant import absmax_reference as reference

    def refuse(*_: object) -> None:
        raise AssertionError("the reference ran on CUDA")

    weight = some_weights(4, 32).to(DEVICE)
    expected = fake_quant(weight, QuantSpec(group_size=16), backend="reference")
    monkeypatch.setattr(reference, "fake_quant", refuse)
    same_bits("values", fake_quant(weight, QuantSpec(group_size=16)), expected)
