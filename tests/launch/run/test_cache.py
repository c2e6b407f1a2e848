"""Recipes that train from a cache of their teacher, in processes of their own."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ...support.warm_python import WarmProcess, WarmPython

Start = Callable[..., WarmProcess]


@pytest.fixture
def recipe(tiny: dict[str, Any]) -> dict[str, Any]:
    teacher = {**tiny["teacher"], "cache": {"mode": "hybrid"}}
    return {**tiny, "teacher": teacher, "stages": [{"distill": {"steps": 6}}]}


@pytest.fixture
def decoct(warm: WarmPython, tmp_path: Path) -> Start:
    """``decoct(recipe, verb, *arguments)`` in a process of its own, in ``tmp_path``."""

    def start(recipe: dict[str, Any], verb: str, *arguments: str) -> WarmProcess:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return warm.start(["-m", "decoct.launch.cli", verb, str(file), *arguments], cwd=tmp_path, merged=True)

    return start


def said(process: WarmProcess, code: int = 0) -> str:
    text = process.communicate(timeout=240)[0]
    assert process.returncode == code, text
    return text


def curve(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["stage"] == "01-distill" and line["step"] > 0]


@pytest.mark.slow
def test_the_verb_fills_what_the_run_reads_with_one_rank_or_two(decoct: Start, tmp_path: Path, recipe: dict[str, Any]) -> None:
    text = said(decoct(recipe, "cache", "--out", "filled"))
    assert "the teacher predicts 96 windows" in text
    assert "bytes a token" in text
    assert "KL(one draw || teacher)" in text
    text = said(decoct(recipe, "run"))
    assert "the teacher predicts" not in text
    assert "from the cache of a scratch teacher" in text
    alone = curve(tmp_path, "tiny")
    assert all(0 < line["covered_mass"] < 1 for line in alone)
    both = {**recipe, "name": "both", "teacher": {**recipe["teacher"], "cache": {"mode": "hybrid", "path": str(tmp_path / "own")}}}
    text = said(decoct(both, "run", "trainer.devices=2"))
    assert "the teacher predicts 96 windows" in text
    assert len(list((tmp_path / "own" / "shards").glob("*.json"))) == 2
    for one, two in zip(alone, curve(tmp_path, "both"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=2e-5)
        assert two["covered_mass"] == pytest.approx(one["covered_mass"], abs=1e-4)
    refused = {**both, "teacher": {**both["teacher"], "cache": {"mode": "sampled", "path": str(tmp_path / "own")}}}
    text = said(decoct(refused, "run", "--out", "refused"), code=2)
    assert "mode is 'hybrid' there and 'sampled' here" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_capture_that_is_killed_goes_on_where_it_was(decoct: Start, tmp_path: Path, recipe: dict[str, Any]) -> None:
    own = tmp_path / "own"
    recipe["teacher"]["cache"]["path"] = str(own)
    said(decoct(recipe, "cache"))
    whole = sum(json.loads(shard.read_text())["figures"]["tokens"] for shard in (own / "shards").glob("*.json"))
    longer = {**recipe, "stages": [{"distill": {"steps": 400}}]}
    process = decoct(longer, "cache")
    until = time.monotonic() + 120
    seen = ""
    assert process.stdout is not None
    while "the teacher predicts" not in seen:
        assert time.monotonic() < until
        seen += process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    text = said(decoct(longer, "cache"))
    assert "damaged" not in text
    after = sum(json.loads(shard.read_text())["figures"]["tokens"] for shard in (own / "shards").glob("*.json"))
    assert after > whole
    assert "the teacher predicts" not in said(decoct(longer, "cache"))


@pytest.mark.slow
def test_cached_states_give_the_run_of_the_live_teacher_with_two_ranks_and_after_a_kill(
    decoct: Start, tmp_path: Path, tiny: dict[str, Any]
) -> None:
    """Reverse KL at temperature 2: of what the other kinds keep it cannot be computed."""
    distill = {"steps": 60, "checkpoint_every": 5, "loss": {"divergence": "reverse_kl", "temperature": 2.0}}
    live = {**tiny, "name": "live", "teacher": {**tiny["teacher"], "load_in": "fp32"}, "stages": [{"distill": distill}]}
    cached = {**live, "name": "cached", "teacher": {**live["teacher"], "cache": {"mode": "hidden", "states": "fp32"}}}
    said(decoct(live, "run"))
    text = said(decoct(cached, "cache", "trainer.devices=2"))
    assert "KL(cache || teacher) 0: states are stored as they are" in text
    process = decoct(cached, "run")
    folder, until = tmp_path / "runs" / "cached" / "01-distill" / "checkpoints", time.monotonic() + 240
    while not any(int(save.name.removeprefix("step-")) >= 10 for save in folder.glob("step-*")):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    text = said(decoct(cached, "run"))
    assert "the teacher predicts" not in text
    assert "continues from the checkpoint of step" in text
    before, after = curve(tmp_path, "live"), curve(tmp_path, "cached")
    assert before[-1]["step"] == 60
    for one, other in zip(before, after, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["covered_mass"] == 1.0


def test_a_recipe_without_a_cache_is_told_how_to_have_one(decoct: Start, tiny: dict[str, Any]) -> None:
    text = said(decoct(tiny, "cache"), code=2)
    assert "teacher.cache.mode=hybrid" in text
