"""The kernels on a CPU: ``test_*kernel.py`` in Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("file", "selection", "at_least"),
    [
        pytest.param("test_absmax_kernel", "96-32 or tiny_and_large or ties or bad_weights or non_contiguous", 25, id="some"),
        pytest.param("test_absmax_kernel", "test", 60, id="all", marks=pytest.mark.slow),
        pytest.param("test_learned_kernel", "test", 30, id="learned"),
        pytest.param("test_range_kernel", "test", 40, id="range"),
        pytest.param("test_float_kernel", "test", 20, id="float"),
        pytest.param("test_activations", "kernels", 18, id="activations"),
    ],
)
def test_kernels_equal_the_reference_in_the_interpreter(tmp_path: Path, file: str, selection: str, at_least: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    # a process of its own: triton reads the variable when it is first imported, and the GPU tests need it unset
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    tests = Path(__file__).with_name(f"{file}.py")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), "-k", selection]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed, result.stdout
    assert int(passed[1]) >= at_least, result.stdout
