"""What every test gets: no network, no home folder, one thread, and GPU tests skipped where there is none."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .support.warm_children import python_arguments
from .support.warm_python import WarmPython

# Lightning (through pytest's warning filters) may have imported torch before OMP_NUM_THREADS was set above.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache or W&B settings."""
    monkeypatch.setenv("DECOCT_CACHE", str(tmp_path / "decoct-cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmPython]:
    """Starts real processes that have imported everything already."""
    python = WarmPython()
    yield python
    python.close()


@pytest.fixture
def warm_judges(warm: WarmPython, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test's own process runs as ``python -m MODULE`` is warm, as what warm processes start: the judge of transformers."""
    cold = subprocess.run

    def run(command: Any, **options: Any) -> "subprocess.CompletedProcess[str]":
        arguments = python_arguments(command)
        return cold(command, **options) if arguments is None else warm.run(arguments, env=options["env"], timeout=options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)


LONGEST = (
    "trainer/loop/test_distributed.py",
    "launch/jobs/test_running.py",
    "launch/plan/test_memory.py",
    "trainer/stages/test_zeros.py",
    "launch/run/test_whole_path.py",
    "benchmarks/test_families.py",
    "launch/run/test_qat_starts.py",
    "qat/fake_quant/test_interpreter.py",
    "trainer/stages/test_quantize.py",
    "qat/readers/test_fuzz_targets.py",
    "launch/plan/test_rounding.py",
)
"""The files that take longest, 40 CPU seconds or more each: they start first, so that no core is idle at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: places.get(item.path, len(places) + (item.path not in slow)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def read_wandb() -> Callable[[Path], list[dict[str, Any]]]:
    """Reads every offline part of a run folder: id, project, config, history, summary, axes, artifacts."""
    return _read_when_written


def _records(path: Path) -> Iterator[bytes]:
    """Payloads of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    data, block, whole = path.read_bytes(), 32_768, b""
    assert data[:4] == b":W&B"
    position = 7
    while position + 7 <= len(data):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield whole
            whole = b""


def _read_back(run_dir: Path) -> list[dict[str, Any]]:
    """What each offline part of a W&B run holds, read from its .wandb file."""
    from wandb.proto import wandb_internal_pb2

    new_record: Any = vars(wandb_internal_pb2)["Record"]

    parts = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        part: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "axes": {}, "artifacts": []}
        for payload in _records(path):
            record = new_record()
            record.ParseFromString(payload)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                part |= {"id": record.run.run_id, "project": record.run.project}
                part["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                part["history"].append({_key(item): json.loads(item.value_json) for item in record.history.item})
            elif kind == "summary":
                part["summary"] |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
            elif kind == "metric":
                part["axes"][record.metric.glob_name or record.metric.name] = record.metric.step_metric
            elif kind == "artifact":
                names = [entry.path for entry in record.artifact.manifest.contents]
                part["artifacts"].append((record.artifact.name, record.artifact.type, names))
            elif kind == "exit":
                part["exit_code"] = record.exit.exit_code
            part["ended"] = kind == "exit"
        parts.append(part)
    return parts


def _read_when_written(run_dir: Path) -> list[dict[str, Any]]:
    """W&B's own process closes the file a moment after ``finish`` returns."""
    deadline = time.monotonic() + 60
    parts = _read_back(run_dir)
    while not all(part.get("ended") for part in parts) and time.monotonic() < deadline:
        time.sleep(0.1)
        parts = _read_back(run_dir)
    return parts


def _key(item: Any) -> str:
    return ".".join(item.nested_key) or item.key
