"""The kernel compiles for NVIDIA GPUs on a machine without one."""

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

from decoct.losses.linear_divergence import fused_kernel, fused_math

POINTERS = {
    "product_ptr": "*fp32", "product_stride": "i64", "bias_ptr": "*fp32", "teacher_ptr": "*fp32", "teacher_stride": "i64",
    "teacher_rows_ptr": "*i64", "teacher_bias_ptr": "*fp32", "labels_ptr": "*i64", "head_from_ptr": "*fp32", "figures_ptr": "*fp32",
    "figures_stride": "i64", "slope_ptr": "*bf16", "V": "i32", "over": "fp32", "soft_weight": "fp32", "hard_weight": "fp32",
    "dial": "fp32", "scale": "fp32", "cap": "fp32", "teacher_scale": "fp32", "teacher_cap": "fp32",
}  # fmt: skip
PLAIN = {
    "HAS_TEACHER": True, "TEACHER_ROWS": False, "SOFT": True, "HARD": False, "TEMPERED": False, "BOTH_KLS": False, "EARLY": True,
    "LATE": False, "HAS_BIAS": False, "HAS_SCALE": False, "HAS_CAP": False, "TEACHER_BIAS": False, "TEACHER_SCALE": False,
    "TEACHER_CAP": False, "BLOCK": 4096,
}  # fmt: skip
EVERYTHING = {name: True if value is False else value for name, value in PLAIN.items()}


def compiled(capability: int, pointers: dict[str, str], constants: dict[str, Any]) -> Any:
    """The kernel for compute capability ``capability``; ptxas (part of triton) has made machine code of it."""
    signature = POINTERS | pointers | dict.fromkeys(constants, "constexpr")
    # what the launcher finds out of aligned buffers and a vocabulary that is a multiple of 16
    names = [name for name, kind in signature.items() if kind.startswith(("*", "i"))]
    attributes = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in names}
    source = ASTSource(fn=fused_kernel.loss_kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert made.asm["cubin"]
    return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("kind", range(8))
@pytest.mark.parametrize("constants", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_every_divergence_compiles_for_hopper(kind: int, constants: dict[str, Any]) -> None:
    late = kind != fused_math.FORWARD
    chosen = {"KIND": kind, "BOTH_KLS": kind in (fused_math.SYMMETRIC, fused_math.ADAPTIVE), "EARLY": not late, "LATE": late}
    code = compiled(90, {"teacher_ptr": "*i16"} if constants is EVERYTHING else {}, constants | chosen).asm["ptx"]
    # a row's loads are wide: four logits, or more, at a time
    assert re.search(r"ld\.global[a-z0-9_.:]*\.v[48]\.b(32|16)", code), "loads are not vectorised"


@pytest.mark.parametrize("capability", [80, 100])
def test_it_compiles_for_ampere_and_blackwell(capability: int) -> None:
    compiled(capability, {}, PLAIN | {"KIND": fused_math.FORWARD})
    compiled(capability, {"slope_ptr": "*fp32"}, EVERYTHING | {"KIND": fused_math.JSD})


def test_nothing_spills_in_the_default_loss() -> None:
    """A tile of 4,096 logits of both models over 8 warps must stay in registers."""
    code = compiled(90, {}, PLAIN | {"KIND": fused_math.FORWARD}).asm["ptx"]
    assert ".local" not in code
