"""The public function around the back ends: arguments, memory layouts, autocast, compile, checkpointing, imports."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from decoct.qat.fake_quant import dequantize, fake_quant, fake_quant_learned, quantize
from decoct.qat.spec import QuantSpec

SPEC = QuantSpec(bits=4, group_size=16)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


def test_importing_needs_torch_and_triton_alone() -> None:
    code = (
        "import sys, decoct.qat.fake_quant, decoct.qat.fake_quant.absmax_reference\n"
        "banned = ('transformers', 'lightning', 'safetensors', 'pydantic', 'datasets', 'wandb', 'decoct.models', 'decoct.trainer')\n"
        "print([name for name in banned if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(2, 3, 16)}, r"weight must be a floating point matrix \[out, in\], not torch.float32 of shape \(2, 3, 16\)"),
        ({"weight": torch.zeros(2, 16, dtype=torch.int8)}, "weight must be a floating point matrix"),
        ({"mask": torch.ones(6, 32)}, "mask must be bool"),
        ({"mask": torch.ones(6, 16, dtype=torch.bool)}, r"got torch.bool of shape \(6, 16\)"),
        ({"spec": QuantSpec(group_size=64)}, "group_size=64 does not divide in_features=32"),
        ({"backend": "cuda"}, "backend='cuda' is not one of auto, reference, triton"),
    ],
)
@pytest.mark.parametrize("function", [fake_quant, quantize])
def test_bad_arguments_are_named(function: Any, weight: torch.Tensor, change: dict[str, Any], words: str) -> None:
    arguments = {"weight": weight, "spec": SPEC} | change
    with pytest.raises(ValueError, match=words):
        function(arguments.pop("weight"), arguments.pop("spec"), **arguments)


def test_triton_back_end_says_where_it_runs(weight: torch.Tensor) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.raises(ValueError, match=r"cannot run on device cpu.*TRITON_INTERPRET=1"):
        fake_quant(weight, SPEC, backend="triton")
    with pytest.raises(ValueError, match=r"not torch.float64; use backend='auto'"):
        fake_quant(weight.double(), SPEC, backend="triton")


def test_non_contiguous_weights_and_gradients(weight: torch.Tensor) -> None:
    mask = torch.rand(32, 6, generator=torch.Generator().manual_seed(1)).t() > 0.5
    strided = weight.t().contiguous().t()
    assert not strided.is_contiguous()
    by_row = dataclasses.replace(SPEC, group_size="channel")
    assert fake_quant(strided, by_row).is_contiguous() and fake_quant_learned(strided, torch.ones(len(strided), 1), by_row).is_contiguous()
    assert not mask.is_contiguous()
    plain = weight.clone().requires_grad_()
    latent = strided.clone(memory_format=torch.preserve_format).requires_grad_()
    upstream = torch.randn(32, 6).t()
    expected = fake_quant(plain, SPEC, mask=mask.contiguous())
    result = fake_quant(latent, SPEC, mask=mask)
    expected.backward(upstream.contiguous())
    result.backward(upstream)
    assert torch.equal(result, expected)
    assert plain.grad is not None
    assert latent.grad is not None
    assert torch.equal(latent.grad, plain.grad)
    assert torch.equal(quantize(strided, SPEC, mask=mask)[0], quantize(weight, SPEC, mask=mask.contiguous())[0])


def test_the_weight_is_left_alone(weight: torch.Tensor) -> None:
    for dtype in (torch.float32, torch.float64):
        before = weight.to(dtype).clone()
        given = before.clone()
        result = fake_quant(given, SPEC)
        quantize(given, SPEC)
        assert torch.equal(given, before)
        assert result.data_ptr() != given.data_ptr()


def test_autocast_changes_nothing(weight: torch.Tensor) -> None:
    expected = fake_quant(weight, SPEC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latent = weight.clone().requires_grad_()
        result = fake_quant(latent, SPEC)
        assert F.linear(torch.randn(2, 32), result).dtype == torch.bfloat16
    result.sum().backward()
    assert torch.equal(result, expected)
    assert latent.grad is not None
    assert latent.grad.dtype == torch.float32


def loss(weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return F.linear(inputs, fake_quant(weight, SPEC)).square().sum() * 2


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(weight: torch.Tensor, compiler: str) -> None:
    inputs = torch.randn(3, 32)
    eager, compiled = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    loss(eager, inputs).backward()
    torch.compile(loss, backend=compiler, fullgraph=True)(compiled, inputs).backward()
    assert eager.grad is not None
    assert compiled.grad is not None
    torch.testing.assert_close(compiled.grad, eager.grad)
    assert torch.equal(compiled.grad == 0, eager.grad == 0)
    made = torch.compile(lambda w: fake_quant(w, SPEC), backend=compiler, fullgraph=True)(weight)
    assert torch.equal(made, fake_quant(weight, SPEC))


def test_gradient_checkpointing_gives_the_same_gradient(weight: torch.Tensor) -> None:
    inputs = torch.randn(3, 32)
    plain, recomputed = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    loss(plain, inputs).backward()
    again = checkpoint(loss, recomputed, inputs, use_reentrant=False)
    assert isinstance(again, torch.Tensor)
    again.backward()
    assert plain.grad is not None
    assert recomputed.grad is not None
    assert torch.equal(plain.grad, recomputed.grad)


def test_operator_is_registered_soundly(weight: torch.Tensor) -> None:
    mask = weight > 0
    arguments = (weight.requires_grad_(), mask, 4, 16, 7.5, [16.0, 2.0**-17, 65280.0])
    torch.library.opcheck(torch.ops.decoct.fake_quant_reference.default, arguments)


def test_dequantize_refuses_shapes_that_do_not_fit() -> None:
    codes = torch.zeros(4, 32, dtype=torch.int8)
    for shape in ((3, 2), (4, 5), (4, 0), (4,)):
        with pytest.raises(ValueError, match="do not fit codes of shape"):
            dequantize(codes, torch.ones(shape))
