"""The command line's surface is frozen: a new or lost option is a decision, made here as well."""

import os
import subprocess
import sys
from typing import Any

import pytest
import typer

from decoct.launch.cli.app import app
from decoct.launch.cli.command_group import options_from_pairs, recipe_keys

SURFACE = {
    "run": {"recipe", "overrides", "--out"},
    "cache": {"recipe", "overrides", "--out"},
    "plan": {
        "recipe",
        "overrides",
        "--gpus",
        "--nodes",
        "--gpu-memory",
        "--tensor-parallel",
        "--gpu",
        "--efficiency",
        "--link",
        "--tokens-per-second",
        "--price",
        "--out",
        "--json",
    },
    "footprint": {"model", "--context", "--batch", "--json"},
    "launch": {
        "recipe",
        "overrides",
        "--target",
        "--print",
        "--gpus",
        "--nodes",
        "--max-restarts",
        "--out",
        "--job-id",
        "--rdzv-endpoint",
        "--node-rank",
        "--grace",
        "--partition",
        "--account",
        "--time",
        "--image",
        "--namespace",
        "--volume-claim",
        "--secret",
        "--kind",
    },
    "doctor": {"--json"},
    "distill": {"model", "overrides", "--teacher", "--text", "--hub", "--tokens", "--seq-length", "--out"},
    "prune": {
        "model",
        "overrides",
        "--ffn",
        "--shape",
        "--budget",
        "--keep",
        "--method",
        "--pattern",
        "--teacher",
        "--text",
        "--hub",
        "--tokens",
        "--seq-length",
        "--out",
    },
    "qat": {
        "model",
        "overrides",
        "--bits",
        "--budget",
        "--group-size",
        "--train",
        "--start",
        "--lora",
        "--teacher",
        "--text",
        "--hub",
        "--tokens",
        "--seq-length",
        "--out",
    },
    "quantize": {
        "model",
        "overrides",
        "--method",
        "--transform",
        "--bits",
        "--budget",
        "--group-size",
        "--calibration-tokens",
        "--teacher",
        "--text",
        "--hub",
        "--seq-length",
        "--out",
    },
    "export": {"model", "--out", "--allow-inexact", "--format", "--reader-version"},
    "plain": {"model", "--out", "--revision"},
    "import": {"source", "--out", "--adapter", "--dtype", "--tokenizer", "--revision"},
    "verify": {"--accept", "folder", "--source", "--runtimes", "--no-runtimes"},
    "evaluate": {
        "model",
        "overrides",
        "--teacher",
        "--text",
        "--hub",
        "--seq-length",
        "--tokens",
        "--max-perplexity-increase",
        "--tasks",
        "--out",
    },
    "generate": {
        "model",
        "--prompt",
        "--prompts",
        "--compare",
        "--chat",
        "--system",
        "--max-tokens",
        "--temperature",
        "--top-p",
        "--seed",
        "--dtype",
        "--revision",
        "--json",
    },
    "chat": {"model", "--system", "--max-tokens", "--temperature", "--top-p", "--seed", "--dtype", "--revision"},
    "compare": {"models", "--text", "--hub", "--seq-length", "--tokens", "--tasks", "--json", "--html"},
    "runs": {"folder", "--json"},
    "clean": {"run", "--cache", "--yes", "--dry-run"},
    "push": {"folder", "hub_id", "--public", "--yes", "--message"},
    "completion": {"shell"},
    "recipes list": set(),
    "recipes show": {"name"},
    "recipes copy": {"name", "target"},
    "recipes schema": {"--out"},
}


def commands() -> dict[str, Any]:
    root = typer.main.get_command(app)
    found = {}
    for name, command in root.commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        inner = getattr(command, "commands", None)
        found.update({f"{name} {sub}": c for sub, c in inner.items()} if inner else {name: command})
    return found


def test_options_are_frozen() -> None:
    seen = {}
    for name, command in commands().items():
        options = set()
        for parameter in command.params:
            named = [*parameter.opts, *parameter.secondary_opts]
            options |= {o for o in named if o.startswith("--")} if any(o.startswith("-") for o in named) else {parameter.name}
        seen[name] = options - {"--help"}
    assert seen == SURFACE


def test_every_verb_has_help_with_an_example() -> None:
    for name, command in commands().items():
        assert command.help, name
        assert (command.epilog or "").startswith("Example: decoct "), name


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["recipes", "list"]])
def test_help_runs(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "decoct.launch.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout or "Usage" in done.stdout


def test_usage_error_ends_with_code_2_and_no_traceback() -> None:
    done = subprocess.run([sys.executable, "-m", "decoct.launch.cli", "run"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def decoct(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "decoct", *arguments]
    return subprocess.run(command, env={**os.environ, "COLUMNS": "300", **environment}, capture_output=True, text=True)


def test_version_is_told_by_the_package_the_module_and_the_option() -> None:
    import decoct as package

    assert decoct("--version").stdout == f"decoct {package.__version__}\n"


def test_shells_complete_verbs_and_options() -> None:
    told = decoct(_DECOCT_COMPLETE="complete_bash", COMP_WORDS="decoct q", COMP_CWORD="1")
    assert told.stdout.split() == ["qat", "quantize"]
    told = decoct(_DECOCT_COMPLETE="complete_bash", COMP_WORDS="decoct distill --to", COMP_CWORD="2")
    assert told.stdout.split() == ["--tokens"]
    # otherwise typer looks for the shell among the processes above, where `make` has none that it knows
    shown = decoct("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_DECOCT_COMPLETE=complete_bash" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["run", "quickstart", "--dry-run"], "`decoct plan RECIPE` shows what a run would do"),
        (["run", "quickstart", "--lr", "1e-4"], "stages.0.learning_rate=1e-4"),
        (["distill", "x", "--learning-rate", "1e-4"], "learning_rate=VALUE with a single verb"),
        (["distill", "x", "--precision", "32"], "write trainer.precision=VALUE"),
        (["qat", "x", "--epochs", "3"], "there are no epochs"),
    ],
)
def test_options_of_other_tools_are_explained(arguments: list[str], hint: str) -> None:
    done = decoct(*arguments)
    assert done.returncode == 2
    assert hint in done.stderr


def test_key_value_is_an_option_where_no_recipe_takes_it() -> None:
    export = commands()["export"].params
    assert options_from_pairs(export, ["m", "out=a=b", "format=gguf", "allow_inexact=true"]) == [
        "m", "--out", "a=b", "--format", "gguf", "--allow-inexact",
    ]  # fmt: skip
    assert options_from_pairs(export, ["--out", "format=x", "model=1", "--", "out=x"]) == ["--out", "format=x", "model=1", "--", "out=x"]
    verify = commands()["verify"].params
    assert options_from_pairs(verify, ["f", "runtimes=false", "runtimes=true"]) == ["f", "--no-runtimes", "--runtimes"]
    with pytest.raises(typer.BadParameter, match="write runtimes=true or runtimes=false"):
        options_from_pairs(verify, ["f", "runtimes=maybe"])


def test_options_of_verbs_with_a_recipe_are_written_as_key_value_too() -> None:
    def read(verb: str, *pairs: str) -> list[str]:
        return options_from_pairs(commands()[verb].params, pairs, recipe_keys(verb))

    assert read("distill", "m", "teacher=big", "out=x", "text=a", "teacher.load_in=nf4", "tokens=2M", "seed=1") == [
        "m", "--teacher", "big", "--out", "x", "--text", "a", "teacher.load_in=nf4", "tokens=2M", "seed=1",
    ]  # fmt: skip
    assert read("prune", "keep=70%", "ffn=64") == ["--keep", "70%", "--ffn", "64"]
    assert read("qat", "bits=3", "group_size=64", "weights.bits=2") == ["--bits", "3", "--group-size", "64", "weights.bits=2"]
    assert read("quantize", "method=gptq") == ["method=gptq"]
    assert read("evaluate", "tokens=4k", "seq_length=128") == ["--tokens", "4k", "--seq-length", "128"]
    assert read("run", "out=x", "name=y", "teacher.path=z") == ["--out", "x", "name=y", "teacher.path=z"]


def test_every_verb_takes_key_value(verb: Any) -> None:
    for name, command in commands().items():
        option = next((p.opts[0].lstrip("-") for p in command.params if p.opts[0].startswith("--")), None)
        if option and not any(p.name == "overrides" for p in command.params):
            assert options_from_pairs(command.params, [f"{option}=true"])[0] == f"--{option}", name
    assert "32000" in verb("footprint", "70B", "context=32k", "json=true").stdout


def test_ctrl_c_speaks_of_checkpoints_only_where_there_are_some(capsys: pytest.CaptureFixture[str]) -> None:
    from decoct.launch.cli.app import _tell_interrupted

    _tell_interrupted(["generate", "model"])
    assert capsys.readouterr().err == "decoct: interrupted\n"
    _tell_interrupted(["run", "recipe.yaml"])
    assert "resume from the last checkpoint" in capsys.readouterr().err
