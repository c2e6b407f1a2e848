import json
from pathlib import Path

import pytest

from decoct.trainer.loop.metrics import MetricsSink


class _Recorder:
    def __init__(self) -> None:
        self.lines: list[tuple[dict[str, float], int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.lines.append((metrics, step))


def _rows(path: Path) -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in map(json.loads, path.read_text().splitlines())]


def test_each_step_is_one_json_line(tmp_path: Path) -> None:
    sink = MetricsSink(tmp_path / "metrics.jsonl")
    sink.write("distill", 1, {"loss": 2.5, "kl": None})
    sink.write("distill", 2, {"loss": 0.1 + 0.2, "kl": 1.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"stage": "distill", "step": 1, "loss": 2.5, "kl": None}
    assert json.loads(lines[1])["loss"] == 0.1 + 0.2, "numbers come back bit by bit"


def test_rewind_cuts_only_later_steps_of_the_stage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = MetricsSink(path)
    for stage, step in [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]:
        sink.write(stage, step, {"loss": 1.0})
    sink.rewind("b", 1)
    assert _rows(path) == [("a", 1), ("a", 2), ("b", 1)]
    sink.rewind("b", 0)
    assert _rows(path) == [("a", 1), ("a", 2)]


def test_rewind_removes_a_line_torn_by_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = MetricsSink(path)
    sink.write("a", 1, {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"stage": "a", "st')
    sink.rewind("a", 5)
    sink.write("a", 2, {"loss": 1.0})
    assert _rows(path) == [("a", 1), ("a", 2)]


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"[1]", b"7", b'{"step": 1}', b'{"stage": "a", "step": "9"}', b'{"stage": 1, "step": 1}', b"[" * 100_000]
)
def test_rewind_removes_lines_that_tell_of_no_step(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = MetricsSink(path)
    sink.write("a", 1, {"loss": 1.0})
    with path.open("ab") as file:
        file.write(line + b"\n")
    sink.rewind("a", 5)
    assert _rows(path) == [("a", 1)]


def test_loggers_get_the_numbers_under_the_stage_name(tmp_path: Path) -> None:
    recorder = _Recorder()
    sink = MetricsSink(tmp_path / "metrics.jsonl", [recorder])  # pyright: ignore[reportArgumentType]
    sink.write("01-distill", 4, {"loss": 2, "kl": None})
    assert recorder.lines == [({"01-distill/loss": 2.0}, 4)]
    sink.write("01-distill", 5, {"tokens": 512, "loss": 1})
    assert recorder.lines[1] == ({"01-distill/tokens": 512.0, "01-distill/loss": 1.0, "tokens": 512.0}, 5), "the axis has no stage in it"


def test_a_sink_without_a_path_is_silent(tmp_path: Path) -> None:
    recorder = _Recorder()
    sink = MetricsSink(None, [recorder])  # pyright: ignore[reportArgumentType]
    sink.write("a", 1, {"loss": 1.0})
    sink.rewind("a", 0)
    sink.flush()
    sink.close()
    assert recorder.lines == []
    assert sink.loggers == []
