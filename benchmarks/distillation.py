"""The same student from the same start for the same tokens: by cross-entropy, by KL to its teacher, from each cache mode, and by TRL.

    python benchmarks/distillation.py [--quick] [--full] [--text FILES ...] [--json FILE]

Each case trains a scratch teacher (the quickstart's on Python's standard library; a stronger one on --text), cuts its student, and trains
that once for each system and seed, each in a process of its own with one thread, as many at once as there are cores. Rows: held-out
perplexity, KL(teacher || student) and top-1 agreement (mean and standard deviation over seeds), tokens per second (median step) and peak
memory beyond the models. Then, for the quickstart's student, steps of 2,048 tokens in turn: what a step from a cache costs beside a plain
cross-entropy step.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from distillation_work import CACHES, SEQ, STEP_TOKENS, TURNS
from rows import Row, report

TOKENS = {"quick": 40_000, "default": 200_000, "full": 2_000_000}
SEEDS = {"quick": 1, "default": 3, "full": 3}
SYSTEMS = ("cross_entropy", "forward_kl", "reverse_kl", *CACHES, "trl")
FIGURES = {"perplexity": "", "kl": "nats", "top1": "share", "tokens_per_second": "tokens/s", "extra_bytes": "B"}
STRONGER = {"hidden": 256, "layers": 6, "heads": 4, "kv_heads": 2, "ffn": 704, "vocab": 4096, "learning_rate": 3e-3}


def recipe(text: list[str], size: str) -> dict[str, Any]:
    """A recipe that makes teacher, tokenizer, windows and student, and trains nothing else."""
    import yaml

    given = yaml.safe_load((Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml").read_text())
    if text:
        given["teacher"]["scratch"] = {**STRONGER, "tokens": 200_000 if size == "quick" else 2_000_000}
        given["data"] = {"files": text, "seq_length": SEQ, "eval_tokens": 32_768}
    elif size == "quick":
        given["teacher"]["scratch"]["tokens"] = 100_000
    given["trainer"]["global_batch_tokens"] = STEP_TOKENS
    # an evaluate stage alone makes teacher, tokenizer, windows and student, and trains nothing
    return {**given, "name": "distillation", "seed": 0, "stages": [{"evaluate": {"round_teacher": False}}]}


def prepare(plain: dict[str, Any], folder: Path) -> None:
    """Teacher, windows and student, in a process of its own."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plain))
    # its own process: what a run keeps in memory must not count in the peaks of the workers
    command = [sys.executable, "-m", "decoct.launch.cli", "run", str(folder / "recipe.yaml"), "--out", str(folder / "run")]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)


def in_own_process(folder: Path, plain: dict[str, Any], work: list[Any]) -> dict[str, float]:
    """``work`` done by a worker of one thread."""
    command = [sys.executable, str(Path(__file__).with_name("distillation_work.py")), json.dumps([str(folder), plain, *work])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{work}: {done.stderr}")
    # libraries may print before the figures
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: str, plain: dict[str, Any], size: str, folder: Path) -> list[Row]:
    """Rows of one teacher and its student."""
    from rich.console import Console

    console = Console(stderr=True)
    prepare(plain, folder)
    rows: list[Row] = []
    seen: dict[str, list[dict[str, float]]] = {}
    systems = [system for system in SYSTEMS if system != "trl" or importlib.util.find_spec("trl")]
    rows += [Row(case, system, "installed", 0, "") for system in SYSTEMS if system not in systems]
    jobs = [(seed, system) for seed in range(1, SEEDS[size] + 1) for system in systems]
    # threads only wait for workers, each of which has one thread of its own
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for (seed, system), figures in zip(jobs, pool.map(lambda job: in_own_process(folder, plain, [job[1], job[0], TOKENS[size]]), jobs)):
            seen.setdefault(system, []).append(figures)
            console.print(f"{case} seed {seed} {system}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    for system, runs in seen.items():
        for name, unit in FIGURES.items():
            values = [run[name] for run in runs]
            rows.append(
                # speed and memory have outliers from other load, quality has none
                Row(case, system, name, statistics.median(values) if name.endswith(("second", "bytes")) else statistics.fmean(values), unit)
            )
            if len(values) > 1 and name in ("perplexity", "kl", "top1"):
                rows.append(Row(case, system, f"{name}_sd", statistics.stdev(values), unit))
    return rows


def main() -> None:
    """Run the cases; print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="default")
    parser.add_argument("--full", dest="size", action="store_const", const="full")
    parser.add_argument("--text", nargs="+", default=[], help="text files for a stronger teacher, beside the quickstart's")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="distillation-") as place:
        quickstart = recipe([], given.size)
        rows += compare("quickstart", quickstart, given.size, Path(place) / "quickstart")
        steps = in_own_process(Path(place) / "quickstart", quickstart, ["steps", TURNS])
        rows += [Row("a step", system, "seconds_ratio", value / steps["cross_entropy"], "x") for system, value in steps.items()]
        if given.text:
            texts = [str(Path(name).resolve()) for name in given.text]
            rows += compare("text", recipe(texts, given.size), given.size, Path(place) / "text")
    report(rows, "one student, by what it learns from", given.json)


if __name__ == "__main__":
    main()
