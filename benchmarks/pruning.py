"""What each way of pruning costs on a real model: single weights, patterns and shapes, each axis and score, beside Torch-Pruning.

    python benchmarks/pruning.py --text HELD_OUT ... --calibration FILES ... [--full] [--peers PYTHON ...] [--folder .real/pruning]
    python benchmarks/pruning.py --quick [--parts weights shapes recovery] [--peers PYTHON] [--json FILE]

SmolLM2-135M by default, the quickstart's teacher with --quick, Gemma 3 270M with --full, or any model folder (--model). Each case is a
recipe that `decoct run` carries out, a random mask, or a folder that Torch-Pruning wrote (an interpreter of --peers) on the same windows.
One `decoct compare` measures all on --text, which no case has read; the whole model and each shape then write 64 tokens in turn. A case
that is there is not made again, so that a killed benchmark goes on where it was. Parts: `weights` (half of the weights, and 2:4), `shapes`
(75 % and 50 % of the decoder layers' parameters by each axis and score), `recovery` (the same shapes repaired, after local distillation,
and after a short distillation). Torch-Pruning's interpreter, with the torch of decoct's own:

    .venv/bin/python -m venv .venv-pruning && .venv-pruning/bin/pip install --no-deps torch-pruning==1.6.0
    .venv/bin/python -c 'import site; print(*site.getsitepackages())' > $(echo .venv-pruning/lib/python3*/site-packages)/torch.pth
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
import distillation
from distillation_work import Bench
from fetch_model import fetch
from pruning_cases import SHARES, Case, cases
from real_models import FIGURES, SMALL_CHECK, interpreter_with, measured
from rows import Row, report

HERE = Path(__file__).parent
PARTS = ("weights", "shapes", "recovery")
HELD_BYTES = 200_000
"""Held-out text of --quick: modules of Python after those that the quickstart reads."""


@dataclass(frozen=True)
class Model:
    """A model that is pruned, and what it is pruned and measured on."""

    folder: Path
    data: Mapping[str, Any]
    """The section ``data`` of the recipes."""


class Maker:
    """Makes the models of the cases in one folder.

    Args:
        given: The command line.
        model: What is pruned.
    """

    def __init__(self, given: argparse.Namespace, model: Model) -> None:
        self.given, self.model, self.folder = given, model, given.folder.resolve()

    def make(self, asked: Sequence[Case]) -> dict[str, Path]:
        """Key -> model folder of each case. Those that are missing are made; the seconds are kept beside each."""
        missing = [case for case in asked if not (self.folder / case.key / "cost.json").exists()]
        # first: a recipe may start from what another tool wrote
        for case in missing:
            if not case.stages:
                self._script(case)
        if recipes := [(str(self.recipe(case)), str(self.folder / case.key)) for case in missing if case.stages]:
            _run([sys.executable, HERE / "pruning_work.py", json.dumps({"kind": "recipes", "recipes": recipes})], "a recipe")
        return {case.key: self.folder / case.key / case.model for case in asked}

    def recipe(self, case: Case) -> Path:
        """The recipe file of a case, written."""
        place = self.folder / case.key
        # a run that trains nothing needs no teacher: it would only measure it
        trains = any("distill" in stage for stage in case.stages)
        recipe = {
            "name": case.key,
            **({"teacher": {"path": str(self.model.folder), "load_in": "fp32"}} if trains else {}),
            "student": {"path": str(self.folder / case.start / "model" if case.start else self.model.folder)},
            "data": dict(self.model.data),
            "stages": list(case.stages),
            "trainer": {"precision": "32", "global_batch_tokens": self.given.step_tokens, "evaluate_every": 10**9},
            "logger": "none",
        }
        place.mkdir(parents=True, exist_ok=True)
        file = place / "case.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return file

    def _script(self, case: Case) -> None:
        place = self.folder / case.key
        place.mkdir(parents=True, exist_ok=True)
        told = {"model": str(self.model.folder), "out": str(place / "model"), **dict(case.told)}
        python, script = sys.executable, "pruning_work.py"
        if case.package:
            python, script = str(interpreter_with(case.package, self.given.peers)), "pruning_peer.py"
            told["windows"] = str(self._windows())
        began = time.perf_counter()
        _run([python, HERE / script, json.dumps(told)], case.key, own=not case.package)
        seconds = time.perf_counter() - began
        print(f"{case.key}: {seconds:.1f} s", file=sys.stderr, flush=True)
        (place / "cost.json").write_text(json.dumps({"seconds": seconds}))

    def _windows(self) -> Path:
        """The windows that our cases calibrate on, for the peer."""
        file = self.folder / "windows.safetensors"
        if not file.exists():
            told = {"kind": "windows", "model": str(self.model.folder), "out": str(file), "data": dict(self.model.data)}
            _run([sys.executable, HERE / "pruning_work.py", json.dumps({**told, "tokens": self.given.calibration_tokens})], "windows")
        return file

    def speeds(self, models: Mapping[str, Path]) -> dict[str, Any]:
        """Tokens per second of the whole model, and of these models over it in turns; those of an earlier call on them are kept."""
        file = self.folder / "speed.json"
        if not file.exists() or set(json.loads(file.read_text())["ratios"]) != set(models):
            told = {"kind": "speed", "model": str(self.model.folder), "others": {key: str(path) for key, path in models.items()}}
            _run([sys.executable, HERE / "pruning_work.py", json.dumps({**told, "turns": self.given.turns, "out": str(file)})], "speed")
        return json.loads(file.read_text())


def _run(command: list[Any], what: str, *, own: bool = True) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not own:
        # another tool's interpreter has nothing of decoct
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{what} failed (exit status {done.returncode}); the rest is kept, and a second call goes on")


def prepared(given: argparse.Namespace) -> Model:
    """The model of the command line, and its text."""
    folder = given.folder.resolve()
    if given.size == "quick":
        plain = yaml.safe_load((HERE.parent / "configs" / "quickstart.yaml").read_text())
        # an evaluate stage alone makes teacher, tokenizer and windows, and trains nothing else
        plain = {**plain, "seed": 0, "stages": [{"evaluate": {"round_teacher": False}}]}
        if not (folder / "quickstart" / "run" / "report.json").exists():
            distillation.prepare(plain, folder / "quickstart")
        given.text = given.text or [str(_held_modules(folder))]
        teacher = Bench(plain, folder / "quickstart").teacher_path
        assert teacher is not None, "the quickstart trains its teacher"
        return Model(Path(teacher), {**plain["data"], "eval_tokens": SMALL_CHECK})
    data = {"files": given.calibration, "seq_length": 512, "eval_tokens": SMALL_CHECK}
    if given.model is not None:
        return Model(given.model.resolve(), data)
    teacher, name = folder / "teacher", "gemma3-270m" if given.size == "full" else "smollm2-135m"
    if not teacher.exists():
        source = fetch(name, folder.parent)
        subprocess.run([sys.executable, "-m", "decoct", "import", source, "--out", teacher, "--dtype", "bf16"], check=True)
    return Model(teacher, data)


def _held_modules(folder: Path) -> Path:
    """Modules of Python that the quickstart's text leaves out for its size, in one file."""
    from decoct.trainer.data.documents import STDLIB_BYTES, stdlib_files

    left, found = STDLIB_BYTES, []
    for file in stdlib_files(Path(sysconfig.get_path("stdlib"))):
        left -= file.stat().st_size
        if left < 0 and sum(map(len, found)) < HELD_BYTES:
            found.append(file.read_text(encoding="utf-8", errors="replace"))
    if not found:
        raise SystemExit("the quickstart reads all modules of this Python; give --text")
    target = folder / "held-out.txt"
    target.write_text("\n".join(found))
    return target


def rows_of(case: str, system: str, row: Mapping[str, Any], cost: Mapping[str, float]) -> list[Row]:
    """The figures of one model from its row of `decoct compare`; ``cost`` is the time of making it."""
    found = [Row(case, system, name, row["eval"][name], unit) for name, unit in FIGURES.items() if row["eval"].get(name) is not None]
    found += [Row(case, system, name, row[name], unit) for name, unit in (("parameters", ""), ("bytes", "B"))]
    return found + [Row(case, system, name, value, "s") for name, value in cost.items()]


def main() -> None:
    """Make what is missing, measure it, print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="default")
    parser.add_argument("--full", dest="size", action="store_const", const="full")
    parser.add_argument("--model", type=Path, help="a model folder in place of the downloaded one")
    parser.add_argument("--text", nargs="+", default=[], help="held-out text, read by no case")
    parser.add_argument("--calibration", nargs="+", default=[], help="text to calibrate and train on")
    parser.add_argument("--tokens", default="16k", help="tokens that are measured")
    parser.add_argument("--calibration-tokens", default="32k")
    parser.add_argument("--local-tokens", default="64k", help="tokens of local distillation")
    parser.add_argument("--distill-tokens", default="50k")
    parser.add_argument("--step-tokens", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=5, help="texts that the whole model and each shape write in turn")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--greedy", action="store_true", help="also choose layers one by one by the loss, many passes over the text")
    parser.add_argument("--peers", nargs="+", default=[], metavar="PYTHON", help="interpreters that have torch_pruning")
    parser.add_argument("--folder", type=Path, default=Path(".real/pruning"))
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    if given.size != "quick" and not (given.text and given.calibration):
        parser.error("give --text HELD_OUT and --calibration FILES (--quick has text of its own)")
    given.folder.mkdir(parents=True, exist_ok=True)
    given.text, given.calibration = ([str(Path(file).resolve()) for file in files] for files in (given.text, given.calibration))
    given.tasks = []
    model = prepared(given)
    maker = Maker(given, model)
    asked = cases(given, model.folder)
    models = maker.make(asked)
    found = measured(given, model.folder, models, sequence=model.data["seq_length"])
    # one case of each shape, and the first with half of the weights, which is no faster
    shapes = {case.name: case for case in reversed(asked)}
    speeds = maker.speeds({name: models[case.key] for name, case in shapes.items()})
    rows = [*rows_of("whole", "whole", found["bf16"], {}), Row("whole", "whole", "tokens_per_second", speeds["whole"], "tokens/s")]
    rows += [Row(name, "shape", "speed", ratio, "x whole") for name, ratio in speeds["ratios"].items()]
    for case in asked:
        cost = json.loads((maker.folder / case.key / "cost.json").read_text())
        rows += rows_of(case.name, case.system, found[case.key], cost)
    shares = ", ".join(f"{share:.0%}" for share in SHARES)
    report(rows, f"what each way of pruning costs; shapes at {shares} of the decoder layers' parameters", given.json)


if __name__ == "__main__":
    main()
