import json
from pathlib import Path

import pytest

from decoct.trainer.loop.metrics import MetricsSink


class _Recorder:
    def __init__(self) -> None:
        self.lines: list[tuple[dict[str, float], int]] = []

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.lines.append((numbers, step))


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


def test_trackers_get_the_numbers_in_groups_over_all_stages(tmp_path: Path) -> None:
    recorder = _Recorder()
    sink = MetricsSink(tmp_path / "metrics.jsonl", [recorder])  # pyright: ignore[reportArgumentType]
    sink.write("01-distill", 4, {"loss": 2, "kl": None})
    assert recorder.lines == [({"train/loss": 2.0, "step": 4.0, "stage": 1.0}, 4)]
    sink.write("01-distill", 5, {"tokens": 512, "loss": 1, "held_out_perplexity": 9.0})
    assert recorder.lines[1][0] == {"train/loss": 1.0, "heldout/perplexity": 9.0, "tokens": 512.0, "step": 5.0, "stage": 1.0}
    sink.write("02-qat", 1, {"tokens": 128, "loss": 3})
    assert recorder.lines[2] == ({"train/loss": 3.0, "tokens": 640.0, "step": 6.0, "stage": 2.0}, 6)
    # the lines of the record are those of the stage
    assert _rows(tmp_path / "metrics.jsonl") == [("01-distill", 4), ("01-distill", 5), ("02-qat", 1)]


def test_a_resumed_stage_goes_on_where_the_stages_before_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsSink(path)
    for stage, step in [("teacher", 3), ("02-qat", 1), ("02-qat", 7), ("01-distill", 4), ("03-evaluated", 9)]:
        first.write(stage, step, {"tokens": 10 * step})
    recorder = _Recorder()
    again = MetricsSink(path, [recorder])  # pyright: ignore[reportArgumentType]
    again.rewind("02-qat", 1)
    again.write("02-qat", 2, {"tokens": 20})
    assert recorder.lines == [({"tokens": 90.0, "step": 9.0, "stage": 2.0}, 9)]


def test_a_sink_without_a_path_is_silent(tmp_path: Path) -> None:
    recorder = _Recorder()
    sink = MetricsSink(None, [recorder])  # pyright: ignore[reportArgumentType]
    sink.write("a", 1, {"loss": 1.0})
    sink.rewind("a", 0)
    sink.flush()
    assert recorder.lines == []
    assert sink.trackers == []
