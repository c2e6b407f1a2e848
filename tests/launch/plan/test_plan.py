"""Plans of the shipped recipes and of a tiny one that is then really run."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from decoct.configs import list_recipes, load_recipe, recipe_from_dict
from decoct.launch.cli.plan_verb import parse_bytes
from decoct.launch.plan.make_plan import StagePlan, plan
from decoct.launch.plan.problems import problems
from decoct.launch.plan.show import as_json, draw, short_form
from decoct.models.common.errors import UserError

from ...support.warm_python import WarmPython

NAMES = [name for name, _, _ in list_recipes()]


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_has_a_plan(name: str) -> None:
    started = time.monotonic()
    made = plan(load_recipe(name))
    assert time.monotonic() - started < 7, "10 seconds with the imports"
    for stage in made.stages:
        assert stage.parameters > 0
        if stage.training:
            assert stage.training.tokens > 0
            assert stage.training.memory.total > stage.parameters
    assert made.disk_bytes > 0


def test_the_verb_prints_json_in_seconds() -> None:
    started = time.monotonic()
    options = ["--gpus", "8", "--gpu-memory", "80GB", "--json"]
    done = subprocess.run([sys.executable, "-m", "decoct.launch.cli", "plan", "qwen3-8b-4b-int4", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 30, "under 10 on an idle machine"
    found = json.loads(done.stdout)
    assert [stage["training"]["fits"] for stage in found["stages"] if stage["training"]] == [True] * 3
    assert found["problems"] == []


def test_a_plan_is_made_without_the_training_library() -> None:
    code = (
        "import sys\nfrom decoct.configs import load_recipe\nfrom decoct.launch.plan.before_run import check_before_run\n"
        "from decoct.launch.plan.make_plan import plan\nplan(load_recipe('quickstart'))\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('lightning', 'torchmetrics', 'wandb')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_later_stage_with_another_value_is_shown() -> None:
    made = plan(load_recipe("quickstart"))
    first, second, third, *_ = (stage for stage in made.stages if stage.training)
    own = [replace(value, value=3) if value.key == "trainer.micro_batch" else value for value in second.values]
    stages = [replace(stage, values=own) if stage is second else stage for stage in made.stages]
    # the third stage is shown too: without its line it would seem to be as the second
    expected = ["", f" ({second.name})", f" ({third.name})"]
    for shown, names in ((made, expected[:1]), (replace(made, stages=stages), expected)):
        out = io.StringIO()
        draw(shown, Console(file=out, width=160))
        lines = [line for line in out.getvalue().splitlines() if "trainer.micro_batch" in line]
        assert len(lines) == len(names), lines
        assert all(f"trainer.micro_batch{name} " in line for name, line in zip(names, lines))
    assert f"trainer.micro_batch ({first.name})" not in out.getvalue()
    assert " 3 " in lines[1] and " 3 " not in lines[0] + lines[2]


def test_values_say_where_they_come_from() -> None:
    made = plan(load_recipe("quickstart", ["stages.0.distill.tokens=100k"]))
    values = {value.key: value for stage in made.stages for value in stage.values} | {value.key: value for value in made.values}
    assert values["stages.0.distill.steps"].value == 196
    assert values["stages.0.distill.steps"].origin == "tokens 100,000 / 512 a step, rounded up"
    assert "192 / hidden 192" in values["stages.0.distill.learning_rate"].origin
    assert values["trainer.gradient_clip"].origin == "default"
    assert values["trainer.precision"].origin == "recipe"


def test_settings_that_can_never_act_are_told() -> None:
    watched = ["stages.0.distill.steps=40", "stages.0.distill.tokens=null", "stages.0.distill.early_stopping.patience=30"]
    rule = "01-distill: early_stopping.patience 30 can never act: the stage has "
    assert rule in short_form(plan(load_recipe("quickstart", watched)))
    rare = [*watched, "stages.0.distill.result=best", "trainer.evaluate_every=41"]
    told = plan(load_recipe("quickstart", rare)).stages[0].notes
    assert [note.partition(";")[0] for note in told] == [
        "result: best can never act: the stage has 1 evaluation",
        "early_stopping.patience 30 can never act: the stage has 1 evaluation",
    ]
    fine = ["stages.0.distill.result=best", "stages.0.distill.early_stopping.patience=3"]
    assert [stage.notes for stage in plan(load_recipe("quickstart", fine)).stages if stage.notes] == []


def test_what_does_not_fit_is_refused_with_the_cheapest_remedy() -> None:
    recipe = load_recipe("smollm2-1.7b-half-int4")
    made = plan(recipe, gpus=1, gpu_memory=24 * 10**9)
    found = problems(made)
    assert [text.split()[0] for text in found] == ["01-distill", "02-qat"]
    assert "the cheapest way: trainer.activation_checkpointing=true (21.8 GB)" in found[0]
    assert "does NOT fit" in short_form(made)
    remedy = made.stages[0].training
    assert remedy is not None
    assert remedy.remedy is not None
    mended = plan(load_recipe("smollm2-1.7b-half-int4", list(remedy.remedy.settings)), gpus=1, gpu_memory=24 * 10**9)
    assert problems(mended) == [], "the remedy is one"
    assert as_json(mended)["stages"][0]["training"]["memory"]["total"] == remedy.remedy.roles.total


@pytest.mark.parametrize(("gpus", "memory"), [(1, 24), (2, 80)])
@pytest.mark.parametrize("name", ["qwen3-8b-4b-int4", "smollm2-1.7b-half-int4"])
def test_a_remedy_is_valid_and_needs_each_of_its_settings(name: str, gpus: int, memory: int) -> None:
    for stage in plan(load_recipe(name), gpus=gpus, gpu_memory=memory * 10**9).stages:
        remedy = stage.training and stage.training.remedy
        if not remedy:
            continue

        def fits(settings: Sequence[str], stage: StagePlan = stage) -> bool | None:
            given = dict(setting.split("=") for setting in settings)
            count = int(given.pop("gpus", gpus))
            mended = plan(load_recipe(name, [f"{key}={value}" for key, value in given.items()]), gpus=count, gpu_memory=memory * 10**9)
            training = next(other for other in mended.stages if other.name == stage.name).training
            return training and training.fits

        assert fits(remedy.settings)
        for one in remedy.settings:
            assert not fits([other for other in remedy.settings if other != one]), f"{one} is not needed"


def test_more_processes_hold_less_each_under_fsdp2() -> None:
    recipe = load_recipe("qwen3-8b-4b-int4")
    one, eight, sixteen = (plan(recipe, gpus=g, nodes=n, gpu_memory=80 * 10**9) for g, n in ((1, 1), (8, 1), (8, 2)))
    totals = [made.stages[0].training.memory.optimizer for made in (one, eight, sixteen) if made.stages[0].training]
    assert totals[0] == pytest.approx(8 * totals[1], rel=1e-3)
    assert totals[1] == pytest.approx(2 * totals[2], rel=1e-3)


def test_a_gguf_that_cannot_be_written_is_told_before_the_run() -> None:
    recipe = load_recipe("smollm2-1.7b-half-int4", ["stages.export.formats=[gguf,compressed-tensors]"])
    assert [text for text in problems(plan(recipe)) if "gguf" in text] == []
    assert "gguf" in short_form(plan(recipe))
    narrow = load_recipe("smollm2-1.7b-half-int4", ["stages.export.formats=[gguf]", "stages.qat.weights.group_size=16"])
    found = [text for text in problems(plan(narrow)) if "gguf" in text]
    assert len(found) == 1
    assert "weights.group_size=32" in found[0]


def test_a_full_disk_is_told_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    made = plan(load_recipe("quickstart"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))  # pyright: ignore[reportAttributeAccessIssue]
    assert "MB free" in problems(made, tmp_path / "runs/x")[0]


def test_every_run_of_a_process_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from decoct.launch.run import runner, start

    planned: list[Any] = []
    monkeypatch.delenv("DECOCT_PLANNED", raising=False)
    monkeypatch.setattr("decoct.launch.plan.before_run.check_before_run", lambda *given, **_: planned.append(given))
    monkeypatch.setattr(runner.Runner, "run", lambda self: None)
    for _ in range(2):
        start.start(load_recipe("quickstart", ["trainer.devices=1"]), tmp_path / "run")
    assert len(planned) == 2


def test_a_run_that_cannot_work_stops_before_it_begins(warm: WarmPython, tmp_path: Path) -> None:
    script, place = tmp_path / "script.py", tmp_path / "place"
    place.mkdir()
    script.write_text(
        "import collections, shutil; from decoct.launch.cli.app import main; "
        "shutil.disk_usage = lambda path: collections.namedtuple('U', 'total used free')(10**9, 10**9, 10**5); "
        "main(['run', 'quickstart'])"
    )
    done = warm.run([str(script)], cwd=place)
    assert done.returncode == 2, done.stderr
    assert "01-distill: 120k tokens in 235 steps" in done.stdout
    assert "cannot work here" in done.stderr
    assert "free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(place.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize(
    ("text", "count"), [("80GB", 80 * 10**9), ("24 GiB", 24 * 2**30), ("1.5tb", 15 * 10**11), ("85899345920", 80 * 2**30)]
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text, "--gpu-memory") == count


@pytest.mark.parametrize("text", ["", "much", "80 bananas", "-3GB", "0", "24"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--gpu-memory"):
        parse_bytes(text, "--gpu-memory")


@pytest.mark.slow
def test_sizes_on_disk_are_within_a_hundredth(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    tiny["teacher"]["scratch"].update(hidden=64, ffn=128)
    tiny["stages"][1]["prune"]["structured"]["ffn"] = 96
    tiny["stages"][-2] = {"export": {}}
    done = run(tiny)
    assert done.returncode == 0, done.stderr
    assert "plan for 1 process on a CPU" in done.stdout
    folder = tmp_path / "runs/tiny"
    # the tokenizer that was trained decides the vocabulary; the plan takes it as asked for
    vocabulary = json.loads((folder / "01-distill/model/config.json").read_text())["vocab_size"]
    tiny["teacher"]["scratch"]["vocab"] = vocabulary
    made = {stage.name: stage for stage in plan(recipe_from_dict(yaml.safe_load(yaml.safe_dump(tiny)))).stages}
    for name, stage in made.items():
        written = sum(file.stat().st_size for file in (folder / name).glob("model/**/*.safetensors"))
        if stage.model_bytes is not None:
            assert stage.model_bytes == pytest.approx(written, rel=0.01), name
        for form, count in stage.exports.items():
            packed = sum(file.stat().st_size for file in (folder / name / form).glob("*.safetensors"))
            assert count == pytest.approx(packed, rel=0.01), (name, form)
    saved = next((folder / "05-qat/checkpoints").glob("step-*"))
    size = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    assert made["05-qat"].training is not None
    assert made["05-qat"].training.checkpoint_bytes == pytest.approx(size, rel=0.1), "small files carry headers and generators"


def test_the_best_checkpoint_counts_on_the_disk() -> None:
    plain = plan(load_recipe("smollm2-1.7b-1b-24gb"))
    asked = plan(load_recipe("smollm2-1.7b-1b-24gb", ["stages.0.result=best"]))
    trained = [stage.training for stage in asked.stages if stage.training]
    assert trained[0].checkpoints == 4
    largest = max(training.checkpoint_bytes * training.checkpoints for training in trained)
    before = max(stage.training.checkpoint_bytes for stage in plain.stages if stage.training)
    assert asked.disk_bytes - plain.disk_bytes == largest - 3 * before > 0


def test_a_cache_counts_by_its_rows_and_the_tokens_of_stages_that_read_it() -> None:
    plain = load_recipe("smollm2-1.7b-1b-24gb")
    cached = load_recipe("smollm2-1.7b-1b-24gb", ["teacher.cache=sampled"])
    extra = plan(cached).disk_bytes - plan(plain).disk_bytes
    tokens = sum(stage.training.tokens for stage in plan(plain).stages if stage.training)
    assert 0 < extra == sum(stage.training.cache_bytes for stage in plan(cached).stages if stage.training) <= 40 * tokens


def test_a_cache_of_hidden_states_counts_by_the_width_of_the_teachers_head() -> None:
    def cached(*overrides: str) -> Any:
        return plan(load_recipe("smollm2-1.7b-1b-24gb", ["teacher.cache.mode=hidden", *overrides])).stages[0].training

    training = cached()
    assert training.cache_bytes == 2 * 2048 * training.tokens
    assert training.cache == "last hidden states in bf16, 4,096 bytes per position; every divergence, KL(cache || teacher) 0"
    assert cached("teacher.cache.states=int8").cache_bytes == (2048 + 2 * 32) * training.tokens
    assert cached("teacher.cache.states=int8").cache.endswith("KL(cache || teacher) measured when it is filled")
    divergent = "stages.0.loss.divergence=reverse_kl"
    assert cached(divergent).cache_bytes == training.cache_bytes, "no divergence needs more"
