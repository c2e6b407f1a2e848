"""A run folder that nobody else changes."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of ``tiny``: one step of ``distill``."""
    return Path(shutil.copytree(made / "runs/tiny", tmp_path / "runs/tiny"))
