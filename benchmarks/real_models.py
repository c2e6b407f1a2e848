"""What each bit costs on a real language model: decoct's rounding and quantized training beside llama.cpp's own types, and pruned students.

    python benchmarks/real_models.py --text HELD_OUT ... --calibration FILES ... [--model smollm2-135m] [--bits 8 4 3 2] [--groups 64]
        [--systems rtn mse gptq qat half] [--qat-tokens 100k 1M] [--llama-quantize TOOL] [--peers PYTHON ...] [--folder .real/benchmark]
        [--llama-cpp PYTHON] [--json FILE]

The model comes from the package index (fetch_model.py), as bf16. Each case is a recipe that `decoct run` carries out, a file of llama.cpp's
llama-quantize, or a folder that llm-compressor or AutoRound rounded (interpreters of --peers, real_models_peer.py) on as many tokens of the
same text. One `decoct compare` then measures all of them on --text, which no case has read. A case that is there already is not made
again, so that a killed benchmark goes on where it was. With --llama-cpp (an interpreter that has xllamacpp) llama.cpp then writes 64 tokens
with bf16, with the export of each GPTQ case and with each of its own types, in turn. Without --calibration the model writes that text
itself. Sizes are those served: packed, with embeddings in 16 bits.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from fetch_model import SOURCES, fetch
from rows import Row, report

SYSTEMS = ("rtn", "mse", "gptq", "qat", "half")
PEERS = {"rtn": "llmcompressor", "gptq": "llmcompressor", "awq": "llmcompressor", "auto-round": "auto_round"}
"""Methods of other tools, and the package that has each."""
LLAMA_TYPES = ("Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K")
FIGURES = {"perplexity": "", "kl": "nats", "kl_p99": "nats", "top1": "share"}
SEQUENCE = 512
SMALL_CHECK = 2048
"""Held-out tokens of each run: its own report is not what is shown."""


@dataclass(frozen=True)
class Case:
    """A model that is made and measured."""

    name: str
    """Name of the case in the rows: a width and group, or a share of the layers."""
    system: str
    """What made it."""
    stages: tuple[dict[str, Any], ...] = ()
    """Stages of its recipe."""
    layers: int | None = None
    """Layers that a student keeps; None = the whole model."""
    llama_type: str | None = None
    """Type of llama.cpp in place of a recipe."""
    peer: tuple[str, int, int] | None = None
    """(method, bits, group size) of another tool in place of a recipe."""

    @property
    def key(self) -> str:
        """Name of its folder."""
        return f"{self.name}-{self.system}".replace(" ", "-")


def cases(given: argparse.Namespace, layers: int) -> list[Case]:
    """Every case that was asked for."""
    found = []
    for bits, group in itertools.product(given.bits, given.groups):
        weights, name = {"bits": bits, "group_size": group}, f"w{bits}-g{group}"
        for method in ("rtn", "mse", "gptq"):
            more = {"calibration_tokens": given.calibration_tokens} if method == "gptq" else {}
            if method in given.systems:
                found.append(Case(name, method, ({"quantize": {"weights": weights, "method": method, **more}},)))
        for method, package in PEERS.items() if bits < 8 else ():
            if method in given.peer_methods and interpreter_with(package, given.peers):
                found.append(Case(name, f"{package} {method}", peer=(method, bits, group)))
        for tokens in given.qat_tokens if "qat" in given.systems and bits < 8 else ():
            stage = {"weights": weights, "tokens": tokens, "calibration_tokens": given.calibration_tokens}
            found.append(Case(name, f"qat {tokens}", ({"qat": stage},)))
    for name, hard in (("forward kl", 0.0), ("cross-entropy", 1.0)):
        if "half" in given.systems:
            stage = {"tokens": given.distill_tokens, "loss": {"hard_weight": hard}}
            found.append(Case("half of the layers", name, ({"distill": stage},), layers=layers // 2))
    if given.llama_quantize:
        found += [Case(kind, "llama.cpp", llama_type=kind) for kind in LLAMA_TYPES]
    return found


def interpreter_with(package: str, peers: Sequence[str]) -> str | None:
    """The first interpreter of --peers that has a package."""
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return next((python for python in peers if not subprocess.run([python, "-c", probe], check=False).returncode), None)


class Maker:
    """Makes the models of the cases in one folder.

    Args:
        given: The command line.
        teacher: The bf16 model folder.
    """

    def __init__(self, given: argparse.Namespace, teacher: Path) -> None:
        self.given, self.teacher, self.folder = given, teacher, given.folder.resolve()

    def make(self, case: Case) -> Path:
        """The model of a case, made if it is missing; its seconds and peak memory are kept beside it."""
        place = self.folder / case.key
        cost = place / "cost.json"
        if case.llama_type:
            target = place / f"{case.llama_type}.gguf"
        else:
            target = place / "model" if case.peer else place / f"{len(case.stages):02}-{next(iter(case.stages[-1]))}/model"
        if cost.exists():
            return target
        place.mkdir(parents=True, exist_ok=True)
        command = self._llama(case, target) if case.llama_type else self._peer(case, target) if case.peer else self._recipe(case, place)
        print(f"{case.key}: {' '.join(map(str, command))}", file=sys.stderr)
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=self.folder)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(
                f"{case.key} failed (exit status {os.waitstatus_to_exitcode(status)}); the rest is kept, and a second call goes on"
            )
        seconds = stage_seconds(place) if case.stages else time.perf_counter() - began
        cost.write_text(json.dumps({"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024}))
        return target

    def _recipe(self, case: Case, place: Path) -> list[Any]:
        text = {"files": self.given.calibration} if self.given.calibration else {"generate": {"tokens": "80k", "document_tokens": 256}}
        student = {"keep": {"layers": case.layers}} if case.layers else {"path": str(self.teacher)}
        recipe = {
            "name": case.key,
            "teacher": {"path": str(self.teacher), "load_in": "fp32"},
            "student": student,
            "data": {**text, "seq_length": SEQUENCE, "eval_tokens": SMALL_CHECK},
            "stages": list(case.stages),
            "trainer": {"precision": "32", "global_batch_tokens": self._step_tokens(case), "evaluate_every": 10**9},
        }
        file = place / "case.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return [sys.executable, "-m", "decoct", "run", file, "--out", place]

    def _step_tokens(self, case: Case) -> int:
        """Tokens of an optimizer step: as many as the verbs of `decoct` take."""
        from decoct.configs.scalars import parse_number
        from decoct.trainer.plan import default_step_windows

        (settings,) = case.stages[-1].values()
        wanted = parse_number(str(settings.get("tokens", SEQUENCE)))
        assert wanted is not None, "the recipe refuses it"
        return SEQUENCE * default_step_windows(int(wanted[0]), SEQUENCE, 1)

    def _llama(self, case: Case, target: Path) -> list[Any]:
        return [Path(self.given.llama_quantize).resolve(), self.bf16_gguf(), target, case.llama_type, "2"]

    def _peer(self, case: Case, target: Path) -> list[Any]:
        assert case.peer is not None
        method, bits, group = case.peer
        python = interpreter_with(PEERS[method], self.given.peers)
        told = {
            "model": str(self.teacher), "windows": str(self._windows()), "out": str(target), "method": method, "bits": bits,
            "group_size": group, "iters": self.given.auto_round_steps,
        }  # fmt: skip
        return [python, Path(__file__).with_name("real_models_peer.py"), json.dumps(told)]

    def _windows(self) -> Path:
        """Windows of the calibration text for the peers, spread over all of it."""
        file = self.folder / "windows.safetensors"
        if not file.exists():
            import torch
            from safetensors.torch import save_file
            from transformers import AutoTokenizer

            from decoct.configs.scalars import parse_number

            wanted = parse_number(self.given.calibration_tokens)
            assert wanted is not None, "the recipes of the other cases have refused it"
            tokenizer = AutoTokenizer.from_pretrained(self.teacher)
            ids = [token for text in self.given.calibration for token in tokenizer(Path(text).read_text())["input_ids"]]
            whole = torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE)
            count = min(len(whole), int(wanted[0]) // SEQUENCE)
            save_file({"input_ids": whole[torch.arange(count) * len(whole) // count].contiguous()}, file)
        return file

    def bf16_gguf(self) -> Path:
        """The teacher as a GGUF file in bf16."""
        from decoct.qat.export.export import export_folder

        folder = self.folder / "gguf-bf16"
        if not folder.exists():
            export_folder(self.teacher, folder, "gguf-bf16", runtimes=False)
        return folder / "model.gguf"


def readable(case: Case, file: Path) -> bool:
    """Whether a case can be measured: forks of llama.cpp fall back to types of their own where 256 does not divide a width."""
    from decoct.models.common.errors import UserError
    from decoct.models.gguf.source import GgufSource

    if case.llama_type is None:
        return True
    try:
        GgufSource(file).check_types()
    except UserError as error:
        print(f"{case.key} is left out: {error}", file=sys.stderr)
        return False
    return True


def decoded(given: argparse.Namespace, maker: Maker, asked: Sequence[Case]) -> list[Row]:
    """Tokens per second of llama.cpp with bf16, with exports of the GPTQ cases that GGUF can hold, and with its own types, in turn."""
    import torch

    from decoct.models.common.errors import UserError
    from decoct.qat.export.export import export_folder
    from decoct.qat.runtimes.llama_cpp_check import run_llama_cpp

    files = {("bf16", "decoct"): maker.bf16_gguf()}
    for case in asked:
        if case.llama_type:
            files[case.name, case.system] = maker.make(case)
        if case.system == "gptq":
            folder = maker.folder / case.key / "gguf"
            try:
                if not folder.exists():
                    export_folder(maker.make(case), folder, "gguf", runtimes=False)
            except UserError as error:
                # a width that no block type of GGUF has
                print(f"{case.key} in GGUF: {error}", file=sys.stderr)
                continue
            files[case.name, case.system] = folder / "model.gguf"
    vocabulary = json.loads((maker.teacher / "config.json").read_text())["vocab_size"]
    prompt = torch.randint(0, vocabulary, (1, 32), generator=torch.Generator().manual_seed(0))
    seen: dict[tuple[str, str], list[float]] = {key: [] for key in files}
    for _ in range(given.turns):
        for key, file in files.items():
            result, logits = run_llama_cpp(file, prompt, vocabulary, given.llama_cpp)
            if logits is None:
                raise SystemExit(f"llama.cpp with {file}: {result}")
            seen[key].append(result["tokens_per_second"])
    return [Row(*key, "llama.cpp decodes", statistics.median(values), "tokens/s") for key, values in seen.items()]


def stage_seconds(place: Path) -> float:
    """Seconds of a run's stages, without opening models and measuring them; a teacher that an earlier run trained does not count."""
    rows = json.loads((place / "report.json").read_text())["stages"]
    return sum(row.get("seconds") or 0.0 for row in rows if row["kind"] != "teacher")


def measured(given: argparse.Namespace, teacher: Path, models: dict[str, Path], sequence: int = SEQUENCE) -> dict[str, dict[str, Any]]:
    """Rows of `decoct compare` by case key, the teacher under "bf16"; those of an earlier call on the same text are kept."""
    kept = given.folder / "measured.json"
    protocol = {"text": sorted(map(str, given.text)), "tokens": given.tokens, "tasks": given.tasks}
    known = json.loads(kept.read_text()) if kept.exists() else {}
    if known.get("protocol") != protocol:
        known = {"protocol": protocol, "rows": {}}
    missing = {key: path for key, path in models.items() if key not in known["rows"]}
    if missing:
        more = ["--tasks", ",".join(given.tasks)] if given.tasks else []
        texts = [argument for file in given.text for argument in ("--text", str(file))]
        command = [sys.executable, "-m", "decoct", "compare", teacher, *missing.values(), *texts, "--seq-length", str(sequence)]
        done = subprocess.run([*command, "--tokens", given.tokens, *more, "--json"], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit("the models cannot be measured; see above")
        rows = json.loads(done.stdout)["models"]
        known["rows"] |= dict(zip(["bf16", *missing], rows))
        kept.write_text(json.dumps(known))
    return known["rows"]


def rows_of(case: str, system: str, row: dict[str, Any], cost: dict[str, float], baseline: float | None) -> list[Row]:
    """The figures of one model.

    Args:
        case: The case.
        system: What made the model.
        row: Its row of `decoct compare`.
        cost: Seconds and peak memory of making it; empty for the teacher.
        baseline: KL of round to nearest at the same width, for the share that was recovered.
    """
    found = [Row(case, system, name, row["eval"][name], unit) for name, unit in FIGURES.items() if row["eval"].get(name) is not None]
    found += [
        Row(case, system, name, row[name], unit)
        for name, unit in (("packed_bytes", "B"), ("packed_bits_per_weight", "bits"))
        if row.get(name)
    ]
    found += [
        Row(case, system, f"{task} {part}", score[part], "share")
        for task, score in row.get("tasks", {}).items()
        for part in ("score", "stderr")
        # an error that is not known is None
        if score[part] is not None
    ]
    found += [Row(case, system, name, value, "s" if name == "seconds" else "B") for name, value in cost.items()]
    kl = row["eval"].get("kl")
    if baseline and kl is not None:
        found.append(Row(case, system, "recovered", 1 - kl / baseline, "share"))
    return found


def main() -> None:
    """Make what is missing, measure it, print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SOURCES, default="smollm2-135m")
    parser.add_argument("--text", nargs="+", required=True, help="held-out text, read by no case")
    parser.add_argument("--calibration", nargs="+", default=[], help="text for GPTQ and training; default: the model's own")
    parser.add_argument("--tokens", default="16k", help="tokens that are measured")
    parser.add_argument("--tasks", nargs="*", default=[], help="tasks of `decoct compare`, such as cloze")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3, 2])
    parser.add_argument(
        "--groups", nargs="+", type=int, default=[64], help="group sizes; 128 divides the widths of Gemma 3, not of SmolLM2"
    )
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=["rtn", "mse", "gptq"])
    parser.add_argument("--calibration-tokens", default="32k")
    parser.add_argument("--qat-tokens", nargs="+", default=["100k"])
    parser.add_argument("--distill-tokens", default="100k")
    parser.add_argument("--llama-quantize", help="llama.cpp's tool; without it there are no rows of llama.cpp")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter that has xllamacpp")
    parser.add_argument("--turns", type=int, default=3, help="starts of llama.cpp with each file")
    parser.add_argument("--peers", nargs="+", default=[], metavar="PYTHON", help="interpreters that have llm-compressor or AutoRound")
    parser.add_argument("--peer-methods", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--auto-round-steps", type=int, default=200, help="AutoRound's steps a layer (its own default is 200)")
    parser.add_argument("--folder", type=Path, default=Path(".real/benchmark"))
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    if given.peers and not given.calibration:
        parser.error("--peers calibrate on --calibration FILES")
    given.folder.mkdir(parents=True, exist_ok=True)
    given.text, given.calibration = ([str(Path(file).resolve()) for file in files] for files in (given.text, given.calibration))
    teacher = given.folder.resolve() / "teacher"
    if not teacher.exists():
        source = fetch(given.model, given.folder.parent)
        subprocess.run([sys.executable, "-m", "decoct", "import", source, "--out", teacher, "--dtype", "bf16"], check=True)
    asked = cases(given, json.loads((teacher / "config.json").read_text())["num_hidden_layers"])
    maker = Maker(given, teacher)
    asked = [case for case in asked if readable(case, maker.make(case))]
    found = measured(given, teacher, {case.key: maker.make(case) for case in asked})
    rows = rows_of("bf16", "bf16", found["bf16"], {}, None)
    baselines = {case.name: found[case.key]["eval"]["kl"] for case in asked if case.system == "rtn"}
    for case in asked:
        cost = json.loads((maker.folder / case.key / "cost.json").read_text())
        rows += rows_of(case.name, case.system, found[case.key], cost, baselines.get(case.name))
    if given.llama_cpp:
        rows += decoded(given, maker, asked)
    report(rows, f"{given.model}: what each bit costs", given.json)


if __name__ == "__main__":
    main()
