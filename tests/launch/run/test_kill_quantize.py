"""Kill -9 while a model is rounded layer by layer: nothing half-written stands there, and the next start ends in the same bits."""

import hashlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ...support.warm_python import WarmProcess, WarmPython

Start = Callable[[Path], WarmProcess]

pytestmark = pytest.mark.slow


def recipe(tiny: dict[str, Any], name: str, student: Path) -> dict[str, Any]:
    settings = {"method": "gptq", "stream": "always", "weights": {"bits": 3, "group_size": 16}}
    data = {**tiny["data"], "eval_tokens": 256}
    return {"name": name, "student": {"path": str(student)}, "data": data, "stages": [{"quantize": settings}], "trainer": tiny["trainer"]}


@pytest.fixture
def start(warm: WarmPython, tmp_path: Path) -> Start:
    """``start(file)``: `decoct run` in a process of its own, in ``tmp_path``."""
    return lambda file: warm.start(["-m", "decoct.launch.cli", "run", str(file)], cwd=tmp_path, merged=True)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "decoct.json"
    }


def test_killed_between_layers(tiny: dict[str, Any], start: Start, run: Any, tmp_path: Path) -> None:
    tiny["teacher"]["scratch"]["layers"] = 12
    made = {**tiny, "name": "made", "student": {"keep": {"layers": 12}}, "stages": [{"distill": {"steps": 1}}]}
    assert run(made).returncode == 0
    student = tmp_path / "runs/made/01-distill/model"
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe(tiny, name, student), sort_keys=False))
    whole = start(tmp_path / "whole.yaml")
    output = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, output
    stage = tmp_path / "runs/killed/01-quantize"
    process = start(tmp_path / "killed.yaml")
    until = time.monotonic() + 240
    while not list(stage.glob(".layers.*.tmp/00001.safetensors")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(stage.glob(".layers.*.tmp")), "killed too late"
    assert not (stage / "model").exists()
    again = start(tmp_path / "killed.yaml")
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    assert hashes(stage / "model") == hashes(tmp_path / "runs/whole/01-quantize/model")
    assert not list((tmp_path / "runs").rglob("*.tmp"))
