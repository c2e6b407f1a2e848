"""Runs and verbs as functions: the same recipes as the command line, results as folders and figures, errors as errors."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

import decoct
from decoct.launch.cli.app import app
from decoct.launch.functions import stages
from decoct.launch.functions.results import RunResult
from decoct.launch.functions.run import pairs
from decoct.models.common.errors import GateFailed, UserError

from ...support.warm_python import WarmPython

NAMES = ("distill", "prune", "qat", "quantize", "evaluate", "export")


def test_the_top_package_hands_on_the_functions_and_stays_light() -> None:
    assert all(callable(getattr(decoct, name)) for name in (*NAMES, "run"))
    assert {*NAMES, "run", "UserError", "GateFailed"} <= set(dir(decoct))
    code = "import sys, decoct; print([m for m in ('torch', 'yaml', 'typer', 'decoct.launch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_qat_is_a_package_and_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "qat", lambda *given, **settings: (given, settings))
    assert decoct.qat("model", bits=3) == (("model",), {"bits": 3})  # pyright: ignore[reportCallIssue]
    from decoct.qat import QuantSpec

    assert QuantSpec(bits=3).bits == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_function_has_the_options_and_defaults_of_its_verb(name: str) -> None:
    import typer

    root: Any = typer.main.get_command(app)
    verb: dict[str, Any] = {one.name: one for one in root.commands[name].params if one.name != "help"}
    function = inspect.signature(getattr(stages, name)).parameters
    # the text is one argument in Python; what else differs is named here
    renamed = {
        "model": "student" if name == "distill" else "model",
        "form": "format",
        "text": "data",
        "hub": "data",
        "overrides": "settings",
    }
    for option, parameter in verb.items():
        own = function[renamed.get(option, option)]
        if option in ("bits", "group_size", "teacher", "tasks", "text", "hub", "overrides", "model", "out"):
            continue
        default = parameter.default() if callable(parameter.default) else parameter.default
        assert own.default == default, (name, option)
    if name in ("qat", "quantize"):
        # text on the command line, where they take a word too
        assert all(str(function[option].default) == verb[option].default for option in ("bits", "group_size"))


def test_keyword_arguments_become_overrides() -> None:
    given = {"seed": 1, "trainer": {"precision": "32"}, "loss": {"temperature": 2}, "imports": Path("a.py"), "stages.0.tokens": "1M"}
    assert pairs(given) == [
        ("seed", 1), ("trainer.precision", "32"), ("loss", {"temperature": 2}), ("import", "a.py"), ("stages.0.tokens", "1M"),
    ]  # fmt: skip


def test_a_mistake_is_raised_with_the_message_of_the_command_line() -> None:
    wrong: dict[str, Any] = {"stages.0.tokns": 1}
    with pytest.raises(UserError, match=r"override 'stages\.0\.tokns': stages\.0\.distill\.tokns: unknown key, did you mean 'tokens'\?"):
        decoct.run("quickstart", **wrong)
    with pytest.raises(UserError, match=r"give exactly one of ffn \(channels kept in every layer\), shape \(.*\) and keep"):
        decoct.prune("m")
    with pytest.raises(UserError, match=r"^method wanda is one shot and takes no tokens; run decoct\.distill on the result"):
        decoct.prune("m", keep=0.5, method="wanda", tokens="1M")
    with pytest.raises(UserError, match=r"weights\.bits: 99 is out of range"):
        decoct.quantize("m", bits=99)
    with pytest.raises(UserError, match=r"data\.seq_length: 1 is out of range"):
        decoct.run({"student": {"path": "m"}, "name": "x", "data": {"builtin": "python-stdlib", "seq_length": 1}, "stages": ["evaluate"]})
    with pytest.raises(UserError, match=r"there is no recipe file 'none\.yaml'"):
        decoct.run("none.yaml")
    with pytest.raises(UserError, match="recipe value seed is a object; give text, numbers, lists and dicts"):
        decoct.run("quickstart", seed=object())


WRONG: Any = 3
MODEL = "a model folder, .gguf file or hub id, or the result of another function"
SLIPS = {
    "run": (lambda: decoct.run(WRONG), "recipe=3 is of the type int; give a recipe file, the name of a shipped recipe, a dict or a Recipe"),
    "a run's folder": (lambda: decoct.run("quickstart", out=WRONG), "out=3 is of the type int; give a folder"),
    "a model": (lambda: decoct.evaluate(cast(Any, None)), f"model=None is of the type NoneType; give {MODEL}"),
    "a student": (lambda: decoct.distill(WRONG, "big"), f"student=3 is of the type int; give {MODEL}"),
    "a teacher": (lambda: decoct.quantize("m", teacher=WRONG), f"teacher=3 is of the type int; give {MODEL}"),
    "no teacher": (
        lambda: decoct.distill("m", cast(Any, None)),
        "distill needs a teacher to learn from: decoct.distill(student, teacher, data)",
    ),
    "a text": (
        lambda: decoct.evaluate("m", WRONG),
        "data=3 is of the type int; give a file, a glob, a list of them, or a dict as the recipe's section data",
    ),
    "a file of a text": (lambda: decoct.evaluate("m", ["a.txt", WRONG]), "data[1]=3 is of the type int; give a file or a glob"),
    "an export's model": (lambda: decoct.export(WRONG, "x"), f"model=3 is of the type int; give {MODEL}"),
    "an export's folder": (lambda: decoct.export("m", WRONG), "out=3 is of the type int; give a folder"),
}


@pytest.mark.parametrize("case", SLIPS)
def test_an_argument_of_the_wrong_type_is_a_mistake_too(case: str) -> None:
    call, expected = SLIPS[case]
    with pytest.raises(UserError) as refused:
        call()
    assert str(refused.value) == expected


SCRIPT = """
import json, sys
import decoct
from pathlib import Path

student, texts = sys.argv[1:3]
small = {"trainer": {"precision": "32"}, "data.eval_tokens": 1024, "seq_length": 32, "quiet": True}
def pairs(**more):
    return {**small, **more}

trained = decoct.distill(student, student, texts, steps=2, out="one", **small)
cut = decoct.prune(trained, texts, ffn=32, out="two", **small)
quantized = decoct.qat(cut, [texts], group_size=16, steps=2, out="three", **small)
rounded = decoct.quantize(cut, texts, method="mse", bits=8, group_size="channel", teacher=trained, out="four", **small)
served = decoct.export(quantized, "served")
seen = decoct.evaluate(served, texts, teacher=student, tokens=1024, seq_length=32, out="five", quiet=True)
again = decoct.run("one/recipe.yaml", out="one", quiet=True)
try:
    decoct.evaluate(cut, texts, teacher=student, tokens=1024, seq_length=32, max_perplexity_increase=-0.5, out="six", quiet=True)
except decoct.GateFailed as error:
    gate = str(error)
try:
    decoct.export(quantized, "served")
except decoct.UserError as error:
    refused = str(error)
pair = decoct.run("one/recipe.yaml", out="pair", trainer={"devices": 2})
print(json.dumps({
    "folders": [str(one.folder) for one in (trained, cut, quantized, rounded, served)],
    "kinds": [one.figures["kind"] for one in (trained, cut, quantized, rounded)],
    "kl": [one.figures["eval"]["kl"] for one in (trained, rounded)],
    "exact": served.exact, "bytes": served.bytes,
    "measured": seen.figures["eval"]["perplexity"], "teacher": seen.teacher["eval"]["perplexity"],
    "same": again.report == trained.run.report, "model": str(again.model), "names": list(again.figures),
    "gate": gate, "refused": refused, "pair": str(pair.model), "table": seen.run.table(100),
}))
"""


@pytest.mark.slow
def test_functions_lead_from_a_folder_to_a_measured_export(small_student: Path, corpus: Path, warm: WarmPython, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = warm.run(["script.py", str(small_student), str(corpus / "*.txt")], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["folders"] == ["one/01-distill/model", "two/01-prune/model", "three/01-qat/model", "four/01-quantize/model", "served"]
    assert all((tmp_path / folder / "config.json").is_file() for folder in told["folders"])
    assert told["kinds"] == ["distill", "prune", "qat", "quantize"]
    assert (told["exact"], told["bytes"]) == (True, sum(f.stat().st_size for f in (tmp_path / "served").glob("*.safetensors")))
    report = json.loads((tmp_path / "five/report.json").read_text())
    assert told["measured"] == report["stages"][-1]["eval"]["perplexity"]
    assert told["teacher"] == report["stages"][0]["eval"]["perplexity"]
    assert (told["model"], told["names"]) == ("one/01-distill/model", ["teacher", "input", "01-distill"])
    assert told["pair"] == "pair/01-distill/model"
    assert "the model is worse than the recipe allows: 01-evaluate: perplexity" in told["gate"]
    assert "served exists" in told["refused"]
    assert "01-evaluate" in told["table"]
    quiet = done.stdout.partition("plan for")[0]
    assert quiet == "", "nothing is printed before the run with two processes"


def test_a_result_finds_model_and_exports(tmp_path: Path) -> None:
    (tmp_path / "01-qat/model").mkdir(parents=True)
    rows = [{"name": "teacher"}, {"name": "01-qat"}, {"name": "02-export"}]
    found = RunResult(folder=tmp_path, report={"stages": rows, "exports": [{"format": "gguf", "path": "02-export/gguf"}]})
    assert found.model == tmp_path / "01-qat/model"
    assert found.exports == {"gguf": tmp_path / "02-export/gguf"}
    assert list(found.figures) == ["teacher", "01-qat", "02-export", "gguf"]
    assert Path(found) == found.model


def test_exit_codes_of_further_processes_become_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from decoct.launch.run import start

    plain = {"name": "x", "student": {"path": "m"}, "data": {"builtin": "python-stdlib"}, "stages": ["evaluate"]}
    monkeypatch.chdir(tmp_path)
    for code, kind in ((1, decoct.DecoctError), (2, UserError), (3, GateFailed), (130, KeyboardInterrupt), (143, SystemExit)):

        def ends(*given: Any, code: int = code, **more: Any) -> None:
            raise SystemExit(code)

        monkeypatch.setattr(start, "start", ends)
        with pytest.raises(kind):
            decoct.run(plain)
