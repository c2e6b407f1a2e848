"""The kernels on a CPU: ``test_*kernel.py`` in Triton's interpreter."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

FAST = {
    "test_absmax_kernel": ("96-32 or tiny_and_large or ties or bad_weights or non_contiguous", 25),
    "test_learned_kernel": ("test", 30),
    "test_range_kernel": ("test", 40),
    "test_float_kernel": ("test", 20),
    "test_activations": ("kernels", 24),
}
SLOW = {"test_absmax_kernel": ("test", 60)}
"""File -> (which of its tests are run, how many they are at least)."""
Outcome = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Outcome]:
    """``interpreted(slow)``: those of ``SLOW`` or ``FAST``, in one process, as it takes longer to start than most files take.

    A process of its own: Triton reads the variable when it is first imported, and the GPU tests need it unset.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    @cache
    def run(slow: bool) -> Outcome:
        files = SLOW if slow else FAST
        chosen = " or ".join(f"({file} and ({selection}))" for file, (selection, _) in files.items())
        paths = [str(Path(__file__).with_name(f"{file}.py")) for file in files]
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *paths, "-k", chosen]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path_factory.mktemp("interpreted"))

    return run


@pytest.mark.parametrize(
    ("file", "slow"),
    [*((file, False) for file in FAST), *(pytest.param(file, True, marks=pytest.mark.slow) for file in SLOW)],
)
def test_kernels_equal_the_reference_in_the_interpreter(interpreted: Callable[[bool], Outcome], file: str, slow: bool) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    result = interpreted(slow)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.findall(rf"^PASSED \S*{file}\.py::", result.stdout, re.MULTILINE)
    assert len(passed) >= (SLOW if slow else FAST)[file][1], result.stdout
