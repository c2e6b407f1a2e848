"""Two runs that want the same of a teacher: one asks, the other waits for it and asks for what is then still missing."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from decoct.losses.settings import LossSettings
from decoct.models.settings import CacheSettings
from decoct.models.teachers import LocalTeacher
from decoct.trainer.soft_targets import fill as opening
from decoct.trainer.soft_targets.cached import CachedTeacher


@pytest.fixture
def request_facts(training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(opening, "_header", lambda _wanted, form: {"bytes_per_token": form.bytes})
    windows = training.RandomWindows(8)
    windows.seq_length = len(windows[0]["input_ids"])
    facts = {"stage": "01-distill", "teacher": SimpleNamespace(name="big"), "cache": CacheSettings(path=str(tmp_path / "cache"))}
    return {**facts, "windows": windows, "tokenizer": None, "v_eff": training.VOCAB}


class Listening(Console):
    """A console that hands on each line that is printed."""

    def __init__(self, heard: Callable[[str], None]) -> None:
        super().__init__(quiet=True)
        self._heard = heard

    def print(self, *objects: Any, **_: Any) -> None:
        """Hand a line on."""
        self._heard(str(objects[0]))


def test_the_second_waits_and_reads_what_the_first_has_captured(request_facts: dict[str, Any], training: ModuleType) -> None:
    asked, begun, waiting = [], threading.Event(), threading.Event()
    said: list[str] = []

    def open_teacher() -> LocalTeacher:
        asked.append(1)
        begun.set()
        assert waiting.wait(60)
        return LocalTeacher(training.tiny_model(2, dropout=0.0), v_eff=training.VOCAB)

    def say(text: str) -> None:
        said.append(text)
        if "waiting" in text:
            waiting.set()

    plan: Any = SimpleNamespace(total_steps=100, batch=SimpleNamespace(global_windows=8), seed=0)
    first = opening.CacheRequest(**request_facts, console=Console(quiet=True), open_teacher=open_teacher)
    second = opening.CacheRequest(**request_facts, console=Listening(say), open_teacher=open_teacher)
    with ThreadPoolExecutor(1) as pool:
        one = pool.submit(opening.cached_teacher, first, LossSettings(), plan)
        assert begun.wait(60)
        two = opening.cached_teacher(second, LossSettings(), plan)
        one.result()
    assert asked == [1]
    assert said[0].endswith("fills the same teacher's cache; waiting for it")
    assert len(said) == 2
    windows = request_facts["windows"]
    batch = {name: torch.stack([windows[at][name] for at in range(8)]) for name in windows[0]}
    assert isinstance(two, CachedTeacher)
    assert len(two.sparse_targets(batch).ids) > 0
