"""A run with parts of the user's own: the example, its report, a changed file, a kill, several processes, and errors in the user's code."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from decoct.configs import load_recipe

from ...support.own_parts import write_parts
from ...support.warm_python import WarmPython

EXAMPLES = Path(__file__).resolve().parents[3] / "docs" / "examples"
Verb = Callable[..., Any]
Run = Callable[..., Any]


@pytest.mark.slow
def test_the_example_runs_and_its_copy_in_the_run_folder_runs_again(verb: Verb, tmp_path: Path) -> None:
    done = verb("run", str(EXAMPLES / "my_recipe.yaml"))
    file = EXAMPLES / "my_parts.py"
    assert done.stderr.count(f"decoct: runs the code of {file}, which the recipe imports") == 1
    sha256 = load_recipe(EXAMPLES / "my_recipe.yaml").imports[0].sha256
    assert f"runs your code: {file} (sha256 {sha256[:8]}): divergence squared_hellinger, data source sums, stage add_noise" in done.stdout
    assert "added noise of 0.05 standard deviations to 15 matrices" in done.stdout
    folder = tmp_path / "runs" / "my_recipe"
    copy = folder / "parts" / f"my_parts-{sha256[:8]}.py"
    assert copy.read_bytes() == file.read_bytes()
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["import"] == [f"parts/{copy.name}"]
    stage = json.loads((folder / "02-add_noise" / "stage.json").read_text())
    assert stage["facts"] == {"matrices": 15}
    assert stage["parts"] == [{"kind": "stage", "name": "add_noise", "sha256": sha256, "file": "my_parts.py"}]
    assert [part["name"] for part in json.loads((folder / "01-distill" / "stage.json").read_text())["parts"]] == [
        "squared_hellinger",
        "moving_average",
    ]
    report = json.loads((folder / "report.json").read_text())
    rows = {row["name"]: row["eval"] for row in report["stages"]}
    assert rows["01-distill"]["kl"] < rows["00-student"]["kl"] / 2
    assert rows["02-add_noise"]["kl"] > rows["01-distill"]["kl"]
    assert report["exports"][0]["exact"] is True
    assert "02-add_noise" in (folder / "report.md").read_text()
    # the run folder stands alone, and nothing in it depends on the file's name
    again = verb("run", str(folder / "recipe.yaml"), "--out", str(folder))
    assert again.stdout.count("is done, skipped") == 4
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    # a look at run folders runs nobody's code
    copy.write_text("raise RuntimeError('was run')")
    assert "finished" in verb("runs").stdout
    assert verb("clean", str(folder), "--dry-run").stderr == ""


BODY = """
@parts.divergence("near")
def near(student, teacher):
    return (student.exp() - teacher.exp()).square().sum(-1)

@parts.stage("look", makes_model=False, reads_text=False)
def look(context):
    return {"windows": len(context.evaluation)}

@parts.callback("total")
class Total:
    def on_start(self, student, optimizer):
        self.student, self.seen = student, torch.zeros((), dtype=torch.float64)
    def after_step(self, step):
        self.seen = self.seen + next(iter(self.student.parameters())).double().sum()
        with torch.no_grad():
            next(iter(self.student.parameters())).add_(1e-6 * float(self.seen))
    def state(self):
        return {"seen": self.seen}
    def load(self, state):
        self.seen = state["seen"]
"""


@pytest.fixture
def recipe(tiny: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Two stages with parts, and one without."""
    write_parts(tmp_path, BODY)
    stages = [{"distill": {"steps": 6, "loss": {"divergence": "near"}}}, "look", {"distill": {"name": "plain", "steps": 2}}]
    return {**tiny, "import": "my_parts.py", "stages": stages}


@pytest.mark.slow
def test_a_changed_file_runs_the_stages_again_that_use_a_part_of_it(recipe: dict[str, Any], run: Run, tmp_path: Path) -> None:
    recipe["stages"].insert(0, {"distill": {"name": "first", "steps": 2}})
    assert run(recipe).returncode == 0
    write_parts(tmp_path, BODY + "# changed\n")
    again = run(recipe)
    assert again.returncode == 0, again.stderr
    skipped = [name for name in ("01-first", "02-distill", "03-look", "04-plain") if f"{name} is done, skipped" in again.stdout]
    # the divergence is the same, so that the last stage's input is too
    assert skipped == ["01-first", "04-plain"]
    assert len(list((tmp_path / "runs/tiny/parts").iterdir())) == 2


@pytest.mark.slow
def test_killed_inside_a_stage_with_a_callback_it_ends_in_the_same_bits(recipe: dict[str, Any], warm: WarmPython, tmp_path: Path) -> None:
    settings = {"steps": 60, "checkpoint_every": 5, "loss": {"divergence": "near"}, "callbacks": ["total"]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**recipe, "stages": [{"distill": settings}]}, sort_keys=False))

    def start(out: str) -> Any:
        return warm.start(["-m", "decoct.launch.cli", "run", "r.yaml", "--out", out], cwd=tmp_path, merged=True)

    whole = start("whole")
    output = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, output
    killed = start("killed")
    saves = tmp_path / "killed/01-distill/checkpoints"
    until = time.monotonic() + 240
    while len(list(saves.glob("step-*"))) < 2:
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    again = start("killed")
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    assert "continues from the checkpoint of step" in output
    one, other = (tmp_path / out / "01-distill/model/model.safetensors" for out in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_every_process_of_a_run_imports_the_file(recipe: dict[str, Any], run: Run, tmp_path: Path, read_report: Any) -> None:
    done = run(recipe, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("runs the code of") == 1
    names = [row["name"] for row in read_report()["stages"]]
    assert names == ["teacher", "00-student", "01-distill", "02-look", "03-plain"]


@pytest.mark.slow
def test_torchrun_s_workers_import_the_file(recipe: dict[str, Any], run: Run) -> None:
    done = run(recipe, "trainer.devices=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("runs the code of") == 1


FAULTS = {
    "a divergence": ("divergence", "return (student.exp() - teacher.exp()).square().sum(-1)", "return student.no_such_method()",
        "my_parts.py:7: AttributeError: 'Tensor' object has no attribute 'no_such_method'; this is code that the recipe imports"),
    "a divergence that returns another thing": ("divergence", ".square().sum(-1)", ".square().sum()",
        "my_parts.py:5: divergence 'near' must return one number per token"),
    "a stage": ("stage", 'return {"windows": len(context.evaluation)}', 'return open("none.txt")',
        "my_parts.py:11: FileNotFoundError: [Errno 2] No such file or directory: 'none.txt'; this is code that the recipe imports"),
    "a stage that returns another thing": ("stage", 'return {"windows": len(context.evaluation)}', "return 1",
        "my_parts.py:9: stage 'look' must return nothing or a dict of facts; it returned int"),
    "a callback": ("callback", "        with torch.no_grad():\n", "        1 / (2 - step)\n        with torch.no_grad():\n",
        "my_parts.py:19: ZeroDivisionError: division by zero; this is code that the recipe imports"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", FAULTS)
def test_an_error_in_the_user_s_code_is_one_message_with_its_line(
    case: str, ranks: int, recipe: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    kind, old, new, told = FAULTS[case]
    body = BODY.replace(old, new)
    if kind == "callback":
        recipe["stages"][0]["distill"]["callbacks"] = ["total"]
    assert body != BODY
    write_parts(tmp_path, body)
    done = run(recipe, ranks=ranks)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1


@pytest.mark.slow
def test_debug_shows_the_traceback(recipe: dict[str, Any], run: Run, tmp_path: Path) -> None:
    write_parts(tmp_path, "x = 1 / 0\n")
    assert "Traceback" not in run(recipe).stderr
    shown = run(recipe, "--debug").stderr
    assert "ZeroDivisionError: division by zero" in shown
    assert "Traceback" in shown


@pytest.mark.slow
def test_a_verb_takes_parts_by_key_and_value(small_student: Path, verb: Verb, tmp_path: Path, corpus: Path) -> None:
    write_parts(tmp_path, BODY + "\n@parts.data_source('twice')\ndef twice(*, text: str):\n    return [text * 2000] * 8\n")
    student, given = str(small_student), ["import=my_parts.py", "data.source=twice", "data.text=kado lofi. ", "--seq-length", "32"]
    verb("distill", student, *given, "--teacher", student, "loss.divergence=near", "steps=2", "data.eval_tokens=512", "--out", "one")
    verb("evaluate", "one/01-distill/model", *given, "--out", "two")
    assert "twice of my_parts.py" in json.loads((tmp_path / "two/report.json").read_text())["protocol"]["text"]
    shown = json.loads(verb("plan", str(EXAMPLES / "my_recipe.yaml"), "--json").stdout)["stages"][0]["values"]
    values = {one["key"].removeprefix("stages.0.distill."): (one["value"], one["origin"]) for one in shown}
    assert values["callbacks.0.decay"] == (0.8, "recipe")
    assert values["loss.sharpness"] == (0.5, "recipe")
    plan = verb("plan", os.path.relpath(tmp_path / "one/recipe.yaml", tmp_path), "--json")
    assert json.loads(plan.stdout)["imports"][0].endswith("data source twice")
