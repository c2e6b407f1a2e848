"""Two runs that want the same of a teacher: one asks, the other waits for it and asks for what is then still missing."""

import threading
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


@pytest.fixture
def context(training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(opening, "_header", lambda _context, _settings, form: {"bytes_per_token": form.bytes})
    windows = training.RandomWindows(8)
    windows.seq_length = len(windows[0]["input_ids"])
    console = Console(quiet=True)
    teacher = SimpleNamespace(cache=CacheSettings(path=str(tmp_path / "cache")), name="big")
    return SimpleNamespace(name="01-distill", teacher=teacher, v_eff=training.VOCAB, data=SimpleNamespace(train=windows), console=console)


def test_the_second_waits_and_reads_what_the_first_has_captured(context: Any, training: ModuleType) -> None:
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
    first: Any = SimpleNamespace(**vars(context), say=lambda _: None)
    second: Any = SimpleNamespace(**vars(context), say=say)
    with ThreadPoolExecutor(1) as pool:
        one = pool.submit(opening.cached_teacher, first, LossSettings(), plan, open_teacher)
        assert begun.wait(60)
        two = opening.cached_teacher(second, LossSettings(), plan, open_teacher)
        one.result()
    assert asked == [1]
    assert said[0].endswith("fills the same teacher's cache; waiting for it")
    assert len(said) == 2
    windows = context.data.train
    batch = {name: torch.stack([windows[at][name] for at in range(8)]) for name in windows[0]}
    assert len(two.sparse_targets(batch).ids) > 0
