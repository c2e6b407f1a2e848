"""A small picture, and a run that a tracker follows over two stages and a resume."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from decoct.trainer.loop.metrics import MetricsSink
from decoct.trainer.settings_watching import LoggerKind, LoggerSettings
from decoct.trainer.trackers.build import build_trackers, finish_trackers

CONFIG = {"seed": 3, "stages": [{"qat": {"steps": 4, "overrides": {"*.down_proj": {"bits": 8}}}}], "tags": ["a", "b"]}

Follow = Callable[..., str]


def _png() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (4, 3), (200, 10, 10)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def follow(tmp_path: Path) -> Follow:
    """``follow(kind, stage, steps, report=False)``: one start of a run in ``tmp_path / 'run'``; what it prints."""

    def start(kind: LoggerKind, stage: str, steps: range, *, report: bool = False, exit_code: int = 0) -> str:
        run_dir = tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        said = io.StringIO()
        trackers = build_trackers(LoggerSettings(kind=(kind,)), run_dir, name="tiny", config=CONFIG, console=Console(file=said, width=1000))
        sink = MetricsSink(run_dir / "metrics.jsonl", trackers)
        sink.rewind(stage, max(0, steps.start - 1))
        for step in steps:
            values: dict[str, Any] = {"tokens": 512 * step, "held_out_kl": 1.0 / max(step, 1)}
            # the line before the first step has nothing of a step
            sink.write(stage, step, {**values, "loss": 2.0 / step, "kl": None} if step else values)
        if report:
            (run_dir / "report.md").write_text("# tiny\n\nall is well\n")
            for tracker in trackers:
                tracker.table("stages", ("step", "perplexity", "kl"), [("teacher", 12.5, None), ("01|distill", 13.25, 0.5)])
                tracker.picture("curves", _png())
                tracker.summary({"final/perplexity": 13.25, "final/name": "x"})
                tracker.files([run_dir / "report.md"])
        finish_trackers(trackers, exit_code=exit_code)
        return said.getvalue()

    return start
