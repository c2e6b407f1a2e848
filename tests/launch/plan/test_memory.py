"""What the plan says of a stage's memory, beside what the stage really takes in a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent / "memory_case.py"


def _measure(*arguments: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["distill"], ["qat"], ["distill", "checkpointing"]], ids=" ".join)
def test_prediction_is_within_a_quarter_of_the_memory_of_a_process(arguments: list[str]) -> None:
    found = _measure(*arguments)
    assert found["measured"] > 500e6
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.25), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("arguments", [["distill", "cuda"], ["qat", "cuda"], ["distill", "checkpointing", "cuda"]], ids=" ".join)
def test_prediction_is_within_15_percent_of_the_allocators_peak(arguments: list[str]) -> None:
    found = _measure(*arguments)
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.15), found
