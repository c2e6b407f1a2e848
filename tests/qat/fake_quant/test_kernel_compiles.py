"""The kernels compile for NVIDIA GPUs on a machine without one, and into the instructions that the bits rest on."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

LATTICE = {
    "WIDTH": 96,
    "QMIN": -8,
    "QMAX": 7,
    "DIVISOR": 7.5,
    "DROPPED_BITS": 16,
    "SMALLEST": 2.0**-17,
    "LARGEST": 65280.0,
    "HAS_MASK": True,
    "BLOCK_GROUPS": 16,
    "BLOCK_WIDTH": 128,
}


def ptx(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> str:
    """PTX of a kernel for Ampere; ptxas (part of triton) has also made machine code of it."""
    signature = pointers | {"num_groups": "i32"} | dict.fromkeys(constants, "constexpr")
    compiled = compile_kernel(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", 80, 32))
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]


def arithmetic(code: str) -> set[str]:
    return set(re.findall(r"\b((?:div|mul|add|sub|fma|mad|rcp)\.[a-z0-9.]*f32)\b", code))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "i16"])
def test_arithmetic_is_ieee_and_never_fused(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from decoct.qat.fake_quant import kernel

    pointers = {"weight_ptr": f"*{dtype}", "mask_ptr": "*u8", "result_ptr": f"*{dtype}", "scale_ptr": "*fp32"}
    forward = arithmetic(ptx(kernel._forward_kernel, pointers, LATTICE | {"IS_CODES": False}))
    pointers = {"grad_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "mask_ptr": "*u8", "result_ptr": f"*{dtype}"}
    gradient = arithmetic(ptx(kernel._gradient_kernel, pointers, LATTICE))
    # no approximate division, no flush of subnormal numbers (.ftz), no fused multiply-add
    assert forward == {"div.rn.f32", "mul.f32", "add.f32"}
    assert gradient == {"div.rn.f32", "mul.f32"}


def test_codes_take_the_same_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from decoct.qat.fake_quant import kernel

    pointers = {"weight_ptr": "*fp32", "mask_ptr": "*u8", "result_ptr": "*i8", "scale_ptr": "*fp32"}
    code = ptx(kernel._forward_kernel, pointers, LATTICE | {"IS_CODES": True, "HAS_MASK": False})
    assert arithmetic(code) == {"div.rn.f32", "add.f32"}
