"""The kernels for given scales equal their reference: values, codes, weight gradients bit for bit, scale gradients to 1e-6.

On a GPU, or on the CPU with TRITON_INTERPRET=1 (``test_interpreter.py``).
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from decoct.qat.fake_quant import fake_quant_learned, quantize, quantize_with
from decoct.qat.fake_quant.learned_reference import fake_quant as reference_fake_quant
from decoct.qat.spec import QuantSpec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
NUMPY_WARNINGS = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
pytestmark = [NUMPY_WARNINGS] if INTERPRETED else [pytest.mark.gpu]

SameBits = Callable[[str, Tensor, Tensor], None]
Check = Callable[..., None]


def some_weights(rows: int, columns: int, scale: float = 0.05) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)) * scale
    weight[rows // 2] = 0
    return weight


def near(scales: Tensor, low: float = 0.5, high: float = 1.5) -> Tensor:
    return scales * (low + (high - low) * torch.rand(scales.shape, generator=torch.Generator().manual_seed(7)))


def run(op: Callable[[Tensor, Tensor], Tensor], weight: Tensor, scale: Tensor) -> list[Tensor]:
    """(values, dL/dw, dL/dscale) with an upstream gradient that is no constant."""
    upstream = upstream_of(weight)
    latent = weight.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    learned = scale.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    result = op(latent, learned)
    ((result * upstream).sum() * 2).backward()
    assert latent.grad is not None and learned.grad is not None
    return [result.detach(), latent.grad, learned.grad]


def upstream_of(weight: Tensor) -> Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)).to(weight)


@pytest.fixture
def check(same_bits: SameBits, lsq_oracle: Callable[..., Any]) -> Check:
    """``check(weight, scale, spec, mask=None)``: values, gradients, codes and scales of both back ends."""

    def compare(weight: Tensor, scale: Tensor, spec: QuantSpec, mask: Tensor | None = None) -> None:
        weight, scale, mask = weight.to(DEVICE), scale.to(DEVICE), None if mask is None else mask.to(DEVICE)
        kernel, again, reference = (
            run(lambda w, s, name=name: fake_quant_learned(w, s, spec, mask=mask, backend=name), weight, scale)  # pyright: ignore
            for name in ("triton", "triton", "reference")
        )
        for i, name in enumerate(("values", "gradient")):
            same_bits(name, kernel[i], reference[i])
        for one, other in zip(kernel, again):
            same_bits("second run", one, other)
        if weight.isfinite().all() and scale.isfinite().all():
            pairs = [quantize_with(weight, scale, spec, mask=mask, backend=name) for name in ("triton", "reference")]
            same_bits("codes", pairs[0][0], pairs[1][0])
            same_bits("scales", pairs[0][1], pairs[1][1])
            _, expected, size = lsq_oracle(weight, pairs[0][1], spec, 2 * upstream_of(weight), mask)
            # a scale beyond a limit gets one-sided gradients: the reference's tests say which
            within = ((kernel[2] - expected).abs() <= 1e-6 * size) | ((kernel[2] == 0) & (reference[2] == 0))
            assert bool(within.all()), f"scale gradient: {((kernel[2] - expected).abs() / size).max():.2e} of its terms"
        else:
            assert torch.equal(kernel[2].isnan(), reference[2].isnan())

    return compare


@pytest.mark.parametrize(("rows", "columns", "group"), [(7, 96, 32), (3, 33, "channel"), (3, 96, 48), (70, 64, 16)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_groups_and_odd_sizes(poisoned: None, check: Check, bits: int, rows: int, columns: int, group: Any) -> None:
    weight, spec = some_weights(rows, columns), QuantSpec(bits=bits, group_size=group)
    scale = near(quantize(weight, spec)[1])
    check(weight, scale, spec)
    check(weight, scale, spec, torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) > 0.5)


def test_ternary_codes(poisoned: None, check: Check) -> None:
    weight, spec = some_weights(7, 96), QuantSpec(ternary=True, group_size=32)
    scale = near(quantize(weight, spec)[1], 0.2, 0.8)
    check(weight, scale, spec)
    check(weight, scale, spec, torch.rand(7, 96, generator=torch.Generator().manual_seed(1)) > 0.5)


@pytest.mark.parametrize("grid", ["bf16_fp16", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grids_and_dtypes(poisoned: None, check: Check, grid: Any, dtype: torch.dtype) -> None:
    spec = QuantSpec(bits=8, group_size=16, scale_grid=grid)
    for size in (1e-30, 0.05, 30.0):
        weight = some_weights(4, 64, size).to(dtype)
        check(weight, near(quantize(weight, spec)[1]), spec)


def test_groups_wider_than_a_block(poisoned: None, check: Check) -> None:
    weight, spec = some_weights(2, 4100), QuantSpec(bits=4, group_size="channel")
    check(weight, near(quantize(weight, spec)[1]), spec, weight > -0.01)


def test_ties_and_limits(check: Check) -> None:
    weight = torch.tensor([[-8.5, -8.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 6.5, 7.0, 7.0000005, 7.5, -7.25, 0.0, -0.0]])
    check(weight, torch.ones(1, 1), QuantSpec(bits=4, group_size=16))


def test_scales_beyond_the_limits(check: Check) -> None:
    scale = torch.tensor([[-1.0], [0.0], [2.0**-18], [2.0**-17], [65280.0], [1e6], [3.4e38], [-3.4e38]])
    for sign in (1, -1):
        check(some_weights(8, 16) * sign, scale, QuantSpec(bits=4, group_size=16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_numbers(check: Check, bad: float, dtype: torch.dtype) -> None:
    weight, scale = some_weights(4, 64).to(dtype), torch.full((4, 4), 0.01)
    spoilt = weight.clone()
    spoilt[3, 20] = bad
    check(spoilt, scale, QuantSpec(group_size=16))
    scale[0, 2] = bad
    check(weight, scale, QuantSpec(group_size=16))
    wide = torch.full((4, 1), 0.01)
    wide[1] = bad
    check(some_weights(4, 33).to(dtype), wide, QuantSpec(group_size="channel"))


def test_non_contiguous(check: Check) -> None:
    weight, scale = some_weights(32, 6).t(), torch.rand(2, 6).t() * 0.02 + 0.01
    assert not weight.is_contiguous()
    check(weight, scale, QuantSpec(group_size=16), torch.rand(32, 6).t() > 0.5)


def test_one_sided_gradients_and_empty(same_bits: SameBits) -> None:
    weight, scale = some_weights(6, 64).to(DEVICE), torch.full((6, 4), 0.01, device=DEVICE)
    spec = QuantSpec(group_size=16)
    _, weight_grad, scale_grad = run(lambda w, s: fake_quant_learned(w, s, spec, backend="triton"), weight, scale)
    _, alone, _ = run(lambda w, s: fake_quant_learned(w, s.detach(), spec, backend="triton") + 0 * s.sum(), weight, scale)
    same_bits("weight gradient alone", alone, weight_grad)
    _, _, alone = run(lambda w, s: fake_quant_learned(w.detach(), s, spec, backend="triton") + 0 * w, weight, scale)
    same_bits("scale gradient alone", alone, scale_grad)
    empty = fake_quant_learned(torch.zeros(0, 32, device=DEVICE), torch.ones(0, 2, device=DEVICE), spec, backend="triton")
    assert empty.shape == (0, 32)


@pytest.mark.parametrize("shared", [False, True])
def test_zero_points_and_a_scale_for_all(poisoned: None, same_bits: SameBits, shared: bool) -> None:
    from decoct.qat.fake_quant.learned_kernel import fake_quant as kernel_op

    weight = (some_weights(6, 64) + 0.02).to(DEVICE)
    shape = (1, 1) if shared else (6, 4)
    scale, zeros = torch.full(shape, 0.01, device=DEVICE), torch.full(shape, -5, dtype=torch.int8, device=DEVICE)
    for given in (None, zeros):
        numbers = (None, given, 4, 16, [16.0, 2.0**-17, 65280.0], 0.25)
        kernel = run(lambda w, s, n=numbers: kernel_op(w, s, *n), weight, scale)
        reference = run(lambda w, s, n=numbers: reference_fake_quant(w, s, *n), weight, scale)
        same_bits("values", kernel[0], reference[0])
        same_bits("gradient", kernel[1], reference[1])
        torch.testing.assert_close(kernel[2], reference[2], rtol=2e-6, atol=1e-5)


def test_operators_are_registered_soundly_and_compile(same_bits: SameBits) -> None:
    weight, scale, spec = some_weights(4, 32).to(DEVICE), torch.full((4, 2), 0.01, device=DEVICE), QuantSpec(group_size=16)
    numbers = (4, 16, [16.0, 2.0**-17, 65280.0], 0.1)
    eager = run(lambda w, s: fake_quant_learned(w, s, spec, backend="triton"), weight, scale)
    leaves = (weight.clone().requires_grad_(), scale.clone().requires_grad_())
    torch.library.opcheck(torch.ops.decoct.fake_quant_learned_triton.default, (*leaves, weight > 0, None, *numbers))
    gradient = torch.ops.decoct.fake_quant_learned_triton_gradient.default
    torch.library.opcheck(gradient, (torch.ones_like(weight), weight, scale, weight > 0, None, *numbers, True, False))
    compiled = torch.compile(lambda w, s: fake_quant_learned(w, s, spec, backend="triton"), backend="aot_eager", fullgraph=True)
    for name, got, expected in zip(("values", "gradient", "scale gradient"), run(compiled, weight, scale), eager):
        same_bits(name, got, expected)
