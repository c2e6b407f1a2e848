"""Runs on a blend of texts, in processes of their own: shares, figures of each text, kills, ranks, messages."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ...support.warm_python import WarmPython
from ..conftest import Run


@pytest.fixture
def blended(tiny: dict[str, Any], corpus: Path) -> dict[str, Any]:
    """``tiny``'s teacher and student on its text, three parts of four, and on rows of numbers."""
    numbers = corpus.parent / "numbers.jsonl"
    numbers.write_text("".join(json.dumps({"text": " ".join(str(at * step) for at in range(20)) + "."}) + "\n" for step in range(1, 200)))
    blend = [
        {"files": [str(corpus / "*.txt")], "name": "words", "weight": 0.75},
        {"files": [str(numbers)], "weight": 0.25, "eval_tokens": 512},
    ]
    return {
        **tiny,
        "data": {"blend": blend, "seq_length": 32, "eval_tokens": 1024},
        "stages": [{"distill": {"steps": 12, "checkpoint_every": 4}}, {"quantize": {"method": "gptq", "calibration_tokens": 1024,
                                                                                   "weights": {"group_size": 16}}}],
    }  # fmt: skip


def curve(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == "01-distill" and line["step"] > 0]


def test_each_text_has_its_share_and_its_figures(
    run: Run, blended: dict[str, Any], tmp_path: Path, read_report: Callable[..., dict[str, Any]]
) -> None:
    done = run(blended)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "text: a blend of words (75.0%): " in done.stdout
    assert "; numbers (25.0%): " in done.stdout
    rows = curve(tmp_path / "runs" / "tiny")
    # 16 windows a step: 12 of words and 4 of numbers, in every step
    for row in rows:
        assert row["kl"] == pytest.approx(0.75 * row["kl.words"] + 0.25 * row["kl.numbers"], rel=0.03)
        assert row["loss.words"] == pytest.approx(row["kl.words"], rel=1e-5)
    last = rows[-1]
    assert last["held_out_kl.numbers"] != pytest.approx(last["held_out_kl.words"], rel=0.01)
    assert last["held_out_perplexity.words"] > 1
    assert last["data_epochs.words"] > 0 < last["data_epochs.numbers"]
    report = read_report()
    assert "a blend of words" in report["protocol"]["text"]
    texts = next(row["texts"] for row in report["stages"] if row["name"] == "01-distill")
    assert texts["words"]["held_out_kl"] == last["held_out_kl.words"] and texts["numbers"]["data_epochs"] == last["data_epochs.numbers"]


@pytest.mark.slow
def test_two_ranks_and_a_kill_give_the_same_curve(warm: WarmPython, run: Run, blended: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**blended, "stages": [{"distill": {"steps": 60, "checkpoint_every": 5}}]}
    assert run({**recipe, "name": "whole"}).returncode == 0
    done = run({**recipe, "name": "pair", "trainer": {**recipe["trainer"], "devices": 2}})
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump({**recipe, "name": "killed"}, sort_keys=False))
    process = warm.start(["-m", "decoct.launch.cli", "run", "killed.yaml"], cwd=tmp_path, merged=True)
    folder, until = tmp_path / "runs" / "killed" / "01-distill" / "checkpoints", time.monotonic() + 240
    while not any(int(save.name.removeprefix("step-")) >= 10 for save in folder.glob("step-*")):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = run({**recipe, "name": "killed"})
    assert "continues from the checkpoint of step" in done.stdout
    whole, pair, killed = (curve(tmp_path / "runs" / name) for name in ("whole", "pair", "killed"))
    texts = [name for name in whole[-1] if "." in name]
    assert len(texts) == 10, texts
    for one, two, again in zip(whole, pair, killed, strict=True):
        for name in ("loss", *texts):
            assert again.get(name) == one.get(name), name
            assert two.get(name) == (None if one.get(name) is None else pytest.approx(one[name], rel=2e-5)), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": ["nowhere/*.txt"]}, "data.blend.1 (nowhere): "),
        ({"eval_tokens": 900_000}, "data.blend.1 (numbers): "),
    ],
)
def test_a_part_that_cannot_be_read_is_named(run: Run, blended: dict[str, Any], change: dict[str, Any], message: str) -> None:
    blended["data"]["blend"][1].update(change)
    done = run(blended)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
