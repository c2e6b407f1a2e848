"""The benchmark of a training step: both systems do the same work, and its rows say how fast."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

from ..support.training_case import tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import training_step  # pyright: ignore[reportMissingImports] - a script, found by sys.path


@pytest.fixture
def given(tmp_path: Path) -> argparse.Namespace:
    """The command line for a tiny model of three layers."""
    tiny_model(dropout=0.0, layers=3).save_pretrained(tmp_path / "model")
    return argparse.Namespace(model=str(tmp_path / "model"), layers=2, tokens=64, seq_length=32, turns=2)


def test_both_systems_see_the_same_loss_and_take_the_same_step(given: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    students = []
    for name, make in list(training_step.SYSTEMS.items()):
        monkeypatch.setitem(training_step.SYSTEMS, name, lambda student, *rest, make=make: students.append(student) or make(student, *rest))
    before = tiny_model(dropout=0.0, layers=3).state_dict()
    seen, first = training_step.seconds(given, "32", "cpu")
    assert {name: len(times) for name, times in seen.items()} == {"decoct": 2, "plain": 2}
    assert first["decoct"] == pytest.approx(first["plain"], rel=1e-4)
    assert first["plain"] > 1e-4
    ours, theirs = (student.state_dict() for student in students)
    # three steps at a small rate: equal, and not where they began
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.allclose(ours[name], theirs[name], atol=1e-7, rtol=0)
    assert float((ours[name] - before[name]).abs().max()) > 1e-6


def test_its_rows_have_a_ratio_for_each_precision(given: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    line = ["training_step.py", "--model", given.model, "--layers", "2", "--tokens", "64", "--seq-length", "32", "--turns", "1"]
    monkeypatch.setattr(sys, "argv", [*line, "--json", str(file)])
    training_step.main()
    text = file.read_text()
    assert text.count('"speed beside plain"') == 2
    assert '"bf16-mixed, 64 tokens"' in text
