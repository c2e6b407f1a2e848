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

GRID = {
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


TARGETS = (80, 90, 100)


def ptx(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], capability: int = 80) -> str:
    """PTX of a kernel; ptxas (part of triton) has also made machine code of it."""
    signature = {"num_groups": "i32"} | pointers | dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    target = GPUTarget("cuda", capability, 32)
    compiled = compile_kernel(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=target)
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]


def arithmetic(code: str) -> set[str]:
    """Names of fp32 instructions; Blackwell has them for pairs too (f32x2)."""
    return set(re.findall(r"\b((?:div|mul|add|sub|fma|mad|rcp)\.[a-z0-9.]*f32)(?:x2)?\b", code))


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "i16"])
def test_arithmetic_is_ieee_and_never_fused(dtype: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from decoct.qat.fake_quant import absmax_kernel as kernel

    pointers = {"weight_ptr": f"*{dtype}", "mask_ptr": "*u8", "result_ptr": f"*{dtype}", "scale_ptr": "*fp32"}
    forward = arithmetic(ptx(kernel._forward_kernel, pointers, GRID | {"IS_CODES": False}, capability))
    pointers = {"grad_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "mask_ptr": "*u8", "result_ptr": f"*{dtype}"}
    gradient = arithmetic(ptx(kernel._gradient_kernel, pointers, GRID, capability))
    # no approximate division, no flush of subnormal numbers (.ftz), no fused multiply-add
    assert forward == {"div.rn.f32", "mul.f32", "add.f32"}
    assert gradient == {"div.rn.f32", "mul.f32"}


def test_codes_take_the_same_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from decoct.qat.fake_quant import absmax_kernel as kernel

    pointers = {"weight_ptr": "*fp32", "mask_ptr": "*u8", "result_ptr": "*i8", "scale_ptr": "*fp32"}
    code = ptx(kernel._forward_kernel, pointers, GRID | {"IS_CODES": True, "HAS_MASK": False})
    assert arithmetic(code) == {"div.rn.f32", "add.f32"}


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "i16"])
def test_given_scales_take_the_same_arithmetic(dtype: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from decoct.qat.fake_quant import learned_kernel

    grid = {name: value for name, value in GRID.items() if name != "DIVISOR"} | {"HAS_ZERO": True, "SHARED": False}
    inputs = {"weight_ptr": f"*{dtype}", "mask_ptr": "*u8", "scale_ptr": "*fp32", "zero_ptr": "*i8"}
    forward = arithmetic(ptx(learned_kernel._forward_kernel, inputs | {"result_ptr": f"*{dtype}"}, grid | {"IS_CODES": False}, capability))
    pointers = inputs | {"grad_ptr": f"*{dtype}", "result_ptr": f"*{dtype}", "scale_grad_ptr": "*fp32", "FACTOR": "fp32"}
    weight_only = {"FOR_WEIGHT": True, "FOR_SCALE": False}
    gradient = arithmetic(ptx(learned_kernel._gradient_kernel, pointers, grid | weight_only, capability))
    assert forward == {"div.rn.f32", "mul.f32", "add.f32", "sub.f32"}
    assert gradient == {"div.rn.f32", "mul.f32", "sub.f32"}
    # the sum of the scale's gradient need not be the reference's bit for bit: it may be fused, but never approximate
    both = ptx(learned_kernel._gradient_kernel, pointers, grid | {"FOR_WEIGHT": True, "FOR_SCALE": True}, capability)
    assert not [name for name in arithmetic(both) if "approx" in name or "ftz" in name]


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "i16"])
def test_ranges_take_the_same_arithmetic(dtype: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from decoct.qat.fake_quant import range_kernel

    pointers = {"weight_ptr": f"*{dtype}", "mask_ptr": "*u8", "first_ptr": "*fp32", "zero_ptr": "*i8", "high_ptr": "*fp32"}
    code = arithmetic(ptx(range_kernel._range_kernel, pointers, GRID | {"DIVISOR": 15.0, "IS_RANGE": False}, capability))
    assert code == {"div.rn.f32", "mul.f32", "add.f32", "sub.f32"}


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("kind", ["nf4", "fp8_e4m3", "mxfp4"])
def test_floats_take_the_same_arithmetic(kind: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from decoct.qat.fake_quant import float_kernel

    way = {"WAY": float_kernel._WAYS[kind], "LIMIT": float_kernel.LIMITS[kind], "SHARED": False}
    constants = {name: GRID[name] for name in ("WIDTH", "HAS_MASK", "BLOCK_GROUPS", "BLOCK_WIDTH")} | way
    for dtype in ("fp32", "i16"):
        pointers = dict.fromkeys(("grad_ptr", "weight_ptr", "result_ptr"), f"*{dtype}")
        pointers |= {"mask_ptr": "*u8", "scale_ptr": "*fp32", "table_ptr": "*fp32"}
        forward = arithmetic(ptx(float_kernel._kernel, pointers, constants | {"IS_GRADIENT": False}, capability))
        gradient = arithmetic(ptx(float_kernel._kernel, pointers, constants | {"IS_GRADIENT": True}, capability))
        assert forward <= {"div.rn.f32", "mul.f32", "add.f32", "sub.f32"}
        assert gradient == {"div.rn.f32", "mul.f32"}
