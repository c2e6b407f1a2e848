"""Which trackers start, and what is refused before any work."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from decoct.models.common.errors import UserError
from decoct.trainer.loop.metrics import MetricsSink
from decoct.trainer.settings_watching import LoggerSettings
from decoct.trainer.trackers.build import build_trackers, check_trackers, finish_trackers


def test_csv_keeps_the_curves_of_every_start(tmp_path: Path) -> None:
    for step in (1, 2):
        trackers = build_trackers(LoggerSettings(kind=("csv",)), tmp_path, name="tiny", config={})
        MetricsSink(tmp_path / "metrics.jsonl", trackers).write("01-a", step, {"loss": 0.5})
        for tracker in trackers:
            # there is no place for these in a CSV file of numbers
            tracker.table("stages", ("x",), [(1,)])
            tracker.picture("curves", b"")
            tracker.summary({"final/kl": 1.0})
            tracker.files([])
        finish_trackers(trackers)
    files = sorted(tmp_path.glob("csv/version_*/metrics.csv"))
    lines = [dict(zip(*(line.split(",") for line in path.read_text().splitlines()))) for path in files]
    assert [(line["train/loss"], float(line["stage"]), line["step"]) for line in lines] == [("0.5", 1.0, "1"), ("0.5", 1.0, "2")]


def test_none_is_nothing_and_others_are_refused(tmp_path: Path) -> None:
    assert build_trackers(LoggerSettings(), tmp_path, name="tiny", config={}) == []
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="kind='tensorbord' is not one of wandb, tensorboard, mlflow, csv, none"):
        LoggerSettings(kind=("tensorbord",))  # pyright: ignore[reportArgumentType]
    assert LoggerSettings(kind="csv").kind == ("csv",)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("kind", "package"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow-skinny")])
def test_a_missing_package_is_named_with_its_command_and_nothing_is_made(
    kind: Any, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = importlib.util.find_spec
    hidden = ("tensorboard", "tensorboardX", "mlflow")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else real(name, *rest))
    settings = LoggerSettings(kind=("csv", kind))
    for refuse in (lambda: check_trackers(settings), lambda: build_trackers(settings, tmp_path, name="tiny", config={})):
        with pytest.raises(UserError) as caught:
            refuse()
        assert str(caught.value) == (
            f"logger: {kind} needs the package {package}, which is not installed here: pip install 'decoct[{kind}]' (or pip install "
            f"{package}). The curves are always in metrics.jsonl of the run folder too; logger: csv or none needs no package."
        )
    assert list(tmp_path.iterdir()) == []
