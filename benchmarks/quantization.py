"""What each bit costs: the same model rounded by each method, and trained rounded by each recipe, beside llm-compressor and torchao.

    python benchmarks/quantization.py [--quick] [--full] [--text FILES ...] [--peers PYTHON ...] [--json FILE]
    python benchmarks/quantization.py --only qat_kl_learned --tokens 1000000 --text FILES ...

A scratch teacher (the quickstart's on Python's standard library; a stronger one on --text) is quantized to 8, 4, 3 and 2 bits in groups
of 64. Rows: held-out perplexity, KL(full || quantized) (mean and 99th percentile), top-1 agreement, seconds, peak memory beyond what the
process held before, and `recovered` = 1 - KL(full || method) / KL(full || RTN). All systems see the same calibration windows, the same
training tokens in the same order, and the same learning rate; torchao's is the best of several. Then, in turn: GPTQ on layers 1,024 wide,
and steps of 2,048 tokens. Peers are looked for in this interpreter and in those of --peers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from distillation import prepare, recipe
from distillation_work import TURNS
from quantization_training import STEPS
from rows import Row, report

HERE = Path(__file__).parent
UNITS = {"perplexity": "", "kl": "nats", "kl_p99": "nats", "top1": "share", "recovered": "share", "seconds": "s", "extra_bytes": "B"}
METHODS = ("rtn", "mse", "gptq")
PEER_METHODS = {"llm-compressor rtn": "rtn", "llm-compressor gptq": "gptq"}


TRAINED, ONCE = ("qat_kl", "qat_kl_learned"), ("qat_ce", "qat_scales_only")


@dataclass(frozen=True)
class Size:
    """How much is done."""

    bits: tuple[int, ...] = (8, 4, 3, 2)
    groups: tuple[int, ...] = (64,)
    trained_bits: tuple[int, ...] = (4, 3, 2)
    once: tuple[int, ...] = (3,)
    """Widths of ``ONCE``."""
    windows: int = 128
    tokens: int = 102_400
    rates: tuple[float, ...] = (1.0, 0.3)
    """torchao's rates, as shares of the stage's own."""
    turns: int = 3
    step_turns: int = TURNS
    """Timed steps of each system."""
    only: tuple[str, ...] = ()
    """Systems beside round to nearest; empty = all, and the timings."""


SIZES = {
    "quick": Size(bits=(4, 2), trained_bits=(4,), once=(), windows=32, tokens=20_480, rates=(1.0,), turns=1),
    "default": Size(),
    "full": Size(groups=(64, 32, 128), tokens=1_000_000, rates=(3.0, 1.0, 0.3, 0.1), turns=5),
}


def interpreter_with(package: str, peers: Sequence[str]) -> str | None:
    """The first interpreter, this one before those of --peers, that has a package."""
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return next((python for python in (sys.executable, *peers) if not subprocess.run([python, "-c", probe], check=False).returncode), None)


class Runner:
    """Starts workers for one model and keeps their rows.

    Args:
        plain: The recipe of the model.
        folder: Work space.
        prefix: What the case names of this model begin with.
        peers: Interpreters of --peers.
    """

    def __init__(self, plain: dict[str, Any], folder: Path, prefix: str, peers: Sequence[str]) -> None:
        self.plain, self.folder, self.prefix = plain, folder, prefix
        self.compressor, self.torchao = interpreter_with("llmcompressor", peers), interpreter_with("torchao", peers)
        self.rows: list[Row] = []
        (folder / "package").mkdir(parents=True, exist_ok=True)
        # an interpreter of --peers has no decoct installed; it finds this checkout under the package's name
        (folder / "package" / "decoct").symlink_to(HERE.parent)

    def work(self, *work: Any, python: str = sys.executable) -> dict[str, float]:
        """``work`` done by a worker of one thread."""
        return self._run(python, "quantization_work.py", [str(self.folder), self.plain, *work])

    def peer(self, **told: Any) -> dict[str, float]:
        """Work of llm-compressor."""
        assert self.compressor is not None
        return self._run(self.compressor, "quantization_peer.py", told)

    def _run(self, python: str, script: str, told: Any) -> dict[str, float]:
        # one thread each: workers run side by side, and times compare work and not the use of cores
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        if python != sys.executable:
            environment["PYTHONPATH"] = str(self.folder / "package")
        command = [python, str(HERE / script), json.dumps(told)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=self.folder, check=False)
        if done.returncode:
            raise SystemExit(f"{command[1:]}: {done.stderr[-4000:]}")
        # libraries print before it
        return json.loads(done.stdout.splitlines()[-1])

    def take(self, case: str, system: str, figures: dict[str, float]) -> None:
        """Rows of a system."""
        told = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"{self.prefix}{case} {system}: {told}", file=sys.stderr, flush=True)
        self.rows += [Row(self.prefix + case, system, name, value, UNITS.get(name, "")) for name, value in figures.items()]

    def missing(self) -> list[Row]:
        """Rows of the peers that are not installed."""
        systems = [*([] if self.compressor else PEER_METHODS), *([] if self.torchao else ["torchao"])]
        return [Row("peers", system, "installed", 0, "") for system in systems]


def quality(runner: Runner, size: Size) -> None:
    """Every method and recipe at every width, as many at once as there are cores."""
    runner.work("windows", size.windows)
    jobs = [(group, bits, name) for name, widths in systems(runner, size).items() for group in size.groups for bits in widths]
    full = runner.work("round", "full", 8, 64)
    runner.take("full", "full", full)
    nearest: dict[tuple[int, int], float] = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for (group, bits, name), figures in zip(jobs, pool.map(lambda job: measure(runner, size, *job), jobs)):
            # RTN is the first system in ``jobs``, so its KL is known when the others need it
            if name == "rtn":
                nearest[bits, group] = figures["kl"]
            recovered = 1 - figures["kl"] / nearest[bits, group]
            runner.take(f"w{bits}-g{group}", name, {**figures, "recovered": recovered})


def systems(runner: Runner, size: Size) -> dict[str, tuple[int, ...]]:
    """The widths of every system that is here; RTN, to which the others are compared, first."""
    peers = dict.fromkeys(PEER_METHODS, size.bits) if runner.compressor else {}
    torchao = {"torchao": size.trained_bits} if runner.torchao else {}
    trained = dict.fromkeys(TRAINED, size.trained_bits) | dict.fromkeys(ONCE, size.once)
    found = dict.fromkeys(METHODS, size.bits) | peers | trained | torchao
    if unknown := [name for name in size.only if name not in found]:
        raise SystemExit(f"--only {unknown[0]}: there are {', '.join(found)}")
    return {name: widths for name, widths in found.items() if not size.only or name in ("rtn", *size.only)}


def measure(runner: Runner, size: Size, group: int, bits: int, name: str) -> dict[str, float]:
    """The figures of one system."""
    if name in METHODS:
        return runner.work("round", name, bits, group)
    if name in PEER_METHODS:
        return compressed(runner, PEER_METHODS[name], bits, group)
    if name == "torchao":
        return best_torchao(runner, bits, group, size)
    return runner.work("train", name, bits, group, size.tokens)


def compressed(runner: Runner, method: str, bits: int, group: int) -> dict[str, float]:
    """llm-compressor's rounding, measured by us."""
    with tempfile.TemporaryDirectory() as place:
        told = {"method": method, "bits": bits, "group_size": group, "out": f"{place}/out.safetensors"}
        seen = runner.peer(model=str(runner.folder / "full"), windows=str(runner.folder / "windows.safetensors"), **told)
        return {**runner.work("written", told["out"], method, bits, group), **seen}


def best_torchao(runner: Runner, bits: int, group: int, size: Size) -> dict[str, float]:
    """torchao's QAT at the rate that serves it best."""
    python = runner.torchao or sys.executable
    runs = [runner.work("train", "torchao", bits, group, size.tokens, rate, python=python) | {"rate_share": rate} for rate in size.rates]
    # the best of several rates, since a rate that suits our scales need not suit theirs
    return min(runs, key=lambda figures: figures["kl"])


def speed(runner: Runner, size: Size) -> None:
    """GPTQ on wide layers beside llm-compressor's, and steps beside plain ones and torchao's; nothing else runs meanwhile."""
    if runner.compressor:
        runner.work("make_wide")
        seen: dict[str, list[dict[str, float]]] = {"gptq": [], "llm-compressor gptq": []}
        told = {"model": str(runner.folder / "wide"), "windows": str(runner.folder / "wide.safetensors"), "warm": True}
        # in turn, never side by side: these are times
        for _ in range(size.turns):
            seen["llm-compressor gptq"].append(runner.peer(**told, method="gptq", bits=4, group_size=64))
            seen["gptq"].append(runner.work("time_wide", 4, 64))
        for name, runs in seen.items():
            runner.take("gptq 1024x2816", name, {key: statistics.median(run[key] for run in runs) for key in runs[0]})
        ratio = statistics.median(ours["seconds"] / theirs["seconds"] for ours, theirs in zip(*seen.values()))
        runner.take("gptq 1024x2816", "gptq", {"seconds_ratio": ratio})
    python = runner.torchao or sys.executable
    systems = [system for system in STEPS if system != "torchao" or runner.torchao]
    for objective in ("cross_entropy", "forward_kl"):
        steps = runner.work("steps", objective, systems, size.step_turns, python=python)
        for system, seconds in steps.items():
            runner.take(f"a step, {objective}", system, {"seconds": seconds, "seconds_ratio": seconds / steps["plain"]})


def main() -> None:
    """Run the cases; print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="default")
    parser.add_argument("--full", dest="size", action="store_const", const="full")
    parser.add_argument("--text", nargs="+", default=[], help="text files for a stronger model than the quickstart's")
    parser.add_argument("--peers", nargs="+", default=[], metavar="PYTHON", help="interpreters that have llm-compressor or torchao")
    parser.add_argument("--only", nargs="+", default=[], metavar="SYSTEM", help="these beside round to nearest, and no timings")
    parser.add_argument("--tokens", type=int, default=None, help="training tokens")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    size = replace(SIZES[given.size], only=tuple(given.only))
    size = size if given.tokens is None else replace(size, tokens=given.tokens)
    texts = [str(Path(name).resolve()) for name in given.text]
    with tempfile.TemporaryDirectory(prefix="quantization-") as place:
        quickstart = Runner(recipe([], given.size), Path(place) / "quickstart", "quickstart " if texts else "", given.peers)
        runners = [Runner(recipe(texts, given.size), Path(place) / "text", "", given.peers)] if texts else []
        systems(quickstart, size)
        judged = runners if texts and given.size != "full" else [*runners, quickstart]
        for runner in judged if size.only else [*runners, quickstart]:
            prepare(runner.plain, runner.folder)
        for runner in judged:
            quality(runner, size)
        if not size.only:
            speed(quickstart, size)
        rows = [row for runner in [*runners, quickstart] for row in runner.rows] + ([] if size.only else quickstart.missing())
    report(rows, "what each bit costs", given.json)


if __name__ == "__main__":
    main()
