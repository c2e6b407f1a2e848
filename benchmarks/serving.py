"""The same student in bf16 and in int4 in each runtime that is installed: tokens per second and peak memory.

    python benchmarks/serving.py [--quick] [--full] [--text FILES ...] [--json FILE] [--peers PYTHON ...] [--threads N]

Runtimes: transformers, which decoct brings; llama.cpp (xllamacpp) and vLLM, here or in the interpreters of --peers. What is timed is first
checked along 2,048 positions of text, by the rules of ``decoct verify``. Then every runtime serves both forms in turn, each time in a new
process: tokens per second of generating one text (64 tokens), and the most memory that all of its processes had at once or one after the
other, shared pages counted in each. transformers and vLLM compute in bf16, llama.cpp as it likes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from rows import Row, report
from serving_student import forms, read_text

LAYERS = {"quick": 2, "default": 4, "full": 4}
WIDER = {"quick": 4, "default": 8, "full": 16}
TURNS = {"quick": 1, "default": 3, "full": 5}
SYSTEMS = {"transformers": "transformers", "llama.cpp": "xllamacpp", "vllm": "vllm"}
"""System -> package that an interpreter must have."""


def interpreter(package: str, peers: list[str]) -> str | None:
    """The first interpreter that has the package; decoct's own is asked first."""
    script = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    for python in (sys.executable, *peers):
        # -P: not from this folder, whose file names may shadow a package
        if subprocess.run([python, "-P", "-c", script], capture_output=True, check=False).returncode == 0:
            return python
    return None


def check(folders: dict[str, Path], pythons: dict[str, str], tokens: Any) -> None:
    """Ends the benchmark when a runtime does not compute what was trained."""
    from decoct.qat.runtimes.check import check_runtimes
    from decoct.qat.runtimes.llama_cpp_check import check_llama_cpp
    from decoct.qat.runtimes.outcome_words import outcome_text

    seen = check_runtimes(folders["folder"], tokens=tokens)
    if "llama.cpp" in pythons:
        seen["llama.cpp"] = check_llama_cpp(folders["gguf"], tokens, pythons["llama.cpp"])
    for name, outcome in seen.items():
        print(f"{folders['folder'].name} in {name}: {outcome_text(outcome)}", file=sys.stderr)
        if outcome["status"] not in ("agrees", "not installed"):
            raise SystemExit(f"{name} does not serve what was trained, so there is nothing to time")


def timed(system: str, python: str, folders: dict[str, Path], tokens: Any) -> dict[str, float]:
    """tokens_per_second and peak_bytes of one start."""
    from decoct.qat.runtimes import transformers_process
    from decoct.qat.runtimes.judge_process import run_judge
    from decoct.qat.runtimes.llama_cpp_check import run_llama_cpp
    from decoct.qat.runtimes.vllm_check import run_vllm

    vocabulary = json.loads((folders["folder"] / "config.json").read_text())["vocab_size"]
    if system == "vllm":
        result, seen = run_vllm(python, folders["folder"], tokens, vocabulary, "auto")
    elif system == "llama.cpp":
        result, seen = run_llama_cpp(folders["gguf"] / "model.gguf", tokens, vocabulary, python)
    else:
        # -W: what its packages warn of is no result
        script = ["-W", "ignore", transformers_process.__file__]
        result, seen = run_judge(python, script, folders["folder"], tokens, {}, dtype="bfloat16")
    if seen is None:
        raise SystemExit(f"{system}: {result}")
    return {name: result[name] for name in ("tokens_per_second", "peak_bytes")}


def main() -> None:
    """Run the cases; print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="default")
    parser.add_argument("--full", dest="size", action="store_const", const="full")
    parser.add_argument("--text", nargs="+", default=[], help="text files that the student learns, instead of modules of Python")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--peers", nargs="+", default=[], help="interpreters that have xllamacpp or vLLM")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every runtime; default: every core")
    given = parser.parse_args()
    import torch

    from decoct.qat.runtimes.vllm_check import PYTHON

    found = {system: interpreter(package, given.peers) for system, package in SYSTEMS.items()}
    pythons = {system: python for system, python in found.items() if python}
    torch.set_num_threads(1)
    # a variable of the user's own must not decide which vLLM is timed
    os.environ.pop(PYTHON, None)
    if "vllm" in pythons:
        os.environ[PYTHON] = pythons["vllm"]
    seen: dict[tuple[str, str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="serving-") as place:
        cases, tokens = forms(Path(place), read_text(given.text), LAYERS[given.size], WIDER[given.size])
        # a step of the small model's training is too short for more than one thread
        torch.set_num_threads(given.threads)
        sizes = {(case, kind): _weights(folder) for case, folders in cases.items() for kind, folder in folders.items()}
        for folders in cases.values():
            check(folders, pythons, tokens)
        for _ in range(TURNS[given.size]):
            for system, python in pythons.items():
                for case, folders in cases.items():
                    for name, value in timed(system, python, folders, tokens[:1, :32].contiguous()).items():
                        seen.setdefault((case, system, name), []).append(value)
    units = {"tokens_per_second": "tokens/s", "peak_bytes": "B"}
    rows = [Row(case, system, name, statistics.median(values), units[name]) for (case, system, name), values in seen.items()]
    rows += [
        Row(case, system, "bytes", sizes[case, "gguf" if system == "llama.cpp" else "folder"], "B") for case in cases for system in pythons
    ]
    rows += [Row(case, system, "installed", 0, "") for case in cases for system in SYSTEMS if system not in pythons]
    report(rows, "one student, by runtime and weights", given.json)


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf"))


if __name__ == "__main__":
    main()
