"""The command line's surface is frozen: a new or lost option is a decision, made here as well."""

import subprocess
import sys
from typing import Any

import pytest
import typer

from decoct.launch.cli import app

SURFACE = {
    "run": {"recipe", "overrides", "--out"},
    "cache": {"recipe", "overrides", "--out"},
    "plan": {"recipe", "overrides", "--gpus", "--nodes", "--gpu-memory", "--tensor-parallel", "--json"},
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
    "prune": {"model", "overrides", "--ffn", "--keep", "--teacher", "--text", "--hub", "--tokens", "--seq-length", "--out"},
    "qat": {
        "model",
        "overrides",
        "--bits",
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
        "--bits",
        "--group-size",
        "--calibration-tokens",
        "--teacher",
        "--text",
        "--hub",
        "--seq-length",
        "--out",
    },
    "export": {"model", "--out", "--allow-inexact", "--format", "--reader-version"},
    "verify": {"folder", "--source", "--runtimes", "--no-runtimes"},
    "evaluate": {"model", "--teacher", "--text", "--hub", "--seq-length", "--tokens", "--max-perplexity-increase", "--out"},
    "recipes list": set(),
    "recipes show": {"name"},
    "recipes copy": {"name", "target"},
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
