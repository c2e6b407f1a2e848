"""The tiny training stage of ``training_case.py``, for tests of the training loop."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

CASE_FILE = Path(__file__).with_name("training_case.py")


@pytest.fixture(scope="session")
def training() -> ModuleType:
    """The module itself: Case, run_case, tiny_model, RandomWindows (test files cannot import each other)."""
    spec = importlib.util.spec_from_file_location("training_case", CASE_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def training_command() -> list[str]:
    """Starts the stage in a process of its own; add WORK, KIND and options."""
    return [sys.executable, str(CASE_FILE)]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Sums in one order whatever the machine; and threads waiting for each other on busy cores slow tiny models down a hundredfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
