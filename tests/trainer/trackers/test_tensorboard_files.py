"""TensorBoard's event files, read back with its own package where that is installed; else what is asked of the logger."""

import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import pytest

from .conftest import Follow


def _read(run_dir: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    found.Reload()
    return found


def test_a_run_of_two_stages_and_a_resume_is_one_line(follow: Follow, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    said = follow("tensorboard", "01-distill", range(1, 4))
    assert said == f"TensorBoard logs into {tmp_path / 'run/tensorboard'}; `tensorboard --logdir {tmp_path}` shows it\n"
    # killed after step 3, whose checkpoint was that of step 1: steps 2 and 3 are taken again
    follow("tensorboard", "01-distill", range(2, 5))
    follow("tensorboard", "02-qat", range(1, 3), report=True)
    seen = _read(tmp_path / "run")
    points = [(event.step, event.value) for event in seen.Scalars("train/loss")]
    assert points == [(1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3)), (4, 0.5), (5, 2.0), (6, 1.0)]
    assert [event.value for event in seen.Scalars("tokens")] == [512, 1024, 1536, 2048, 2560, 3072]
    assert [event.value for event in seen.Scalars("heldout/kl")][-2:] == [1.0, 0.5]
    assert seen.Scalars("final/perplexity")[-1].value == 13.25
    assert seen.Tags()["images"] == ["curves"]
    texts = {tag: seen.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in seen.Tags()["tensors"]}
    assert texts["report/text_summary"] == "# tiny\n\nall is well\n"
    assert "    seed: 3\n" in texts["recipe/text_summary"]
    assert "| 01\\|distill | 13.25 | 0.5 |" in texts["stages/text_summary"]


def test_a_stage_that_begins_anew_leaves_the_last_step_before_it(follow: Follow, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    follow("tensorboard", "01-distill", range(1, 4))
    follow("tensorboard", "02-qat", range(0, 3))
    follow("tensorboard", "02-qat", range(0, 2))
    assert [event.step for event in _read(tmp_path / "run").Scalars("train/loss")] == [1, 2, 3, 4]


class _Writer:
    """What of a SummaryWriter is used."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls

    def add_text(self, key: str, text: str, step: int) -> None:
        self.calls.append(("text", key, step))

    def add_image(self, key: str, pixels: Any, step: int, dataformats: str) -> None:
        self.calls.append(("image", key, step, pixels.shape, dataformats))


class _Logger:
    """Lightning's logger, without the package behind it."""

    calls: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, **arguments: Any) -> None:
        self.calls.append(("open", str(arguments["save_dir"]), arguments["name"], arguments["version"], arguments.get("purge_step")))
        self.experiment = _Writer(self.calls)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append(("metrics", sorted(metrics), step))

    def save(self) -> None:
        self.calls.append(("save",))

    def finalize(self, status: str) -> None:
        self.calls.append(("finalize", status))


def test_what_is_asked_of_the_logger(follow: Follow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    monkeypatch.setattr("lightning.pytorch.loggers.TensorBoardLogger", _Logger)
    monkeypatch.setattr(_Logger, "calls", [])
    follow("tensorboard", "02-qat", range(7, 8), report=True, exit_code=1)
    where = (str(tmp_path / "run"), "tensorboard", "")
    assert _Logger.calls == [
        ("open", *where, None),
        ("open", *where, 7),
        ("text", "recipe", 0),
        ("metrics", ["heldout/kl", "stage", "step", "tokens", "train/loss"], 7),
        ("text", "stages", 7),
        ("image", "curves", 7, (3, 4, 3), "HWC"),
        ("metrics", ["final/perplexity"], 7),
        ("text", "report", 7),
        ("save",),
        ("finalize", "failed"),
    ]
