"""What several processes cost: the step time of two gloo ranks beside that of one rank with half the batch, same work a rank.

    python benchmarks/scaling.py [--quick] [--full] [--json FILE]

A rank of the two does what the one does, and waits and talks besides: the ratio of the step times is the price of communication and
idle time. Every process has one thread. First the strategies' losses are compared with those of one process on the whole batch.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from rows import Row, report

SIZES = {"quick": (192, 4, 12), "default": (512, 6, 20), "full": (768, 12, 30)}
"""hidden, layers, optimizer steps."""
WARM_UP = 4
WINDOWS, SEQ, VOCAB = 8, 256, 8192
SYSTEMS = ("one", "ddp", "fsdp2")


def work(folder: Path, system: str, size: str, windows: int) -> None:
    """A rank's part of one run: forward KL to a teacher of the student's own shape, on random tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from decoct.losses.settings import LossSettings
    from decoct.models.teachers import LocalTeacher
    from decoct.trainer.loop.fit import fit
    from decoct.trainer.loop.metrics import MetricsSink
    from decoct.trainer.loop.objective import Objective
    from decoct.trainer.plan import BatchPlan, TrainingPlan
    from decoct.trainer.processes.world import current_world

    torch.set_num_threads(1)
    hidden, layers, steps = SIZES[size]
    world = current_world()

    def model(seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "vocab_size": VOCAB}
        heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "tie_word_embeddings": True}
        return LlamaForCausalLM(LlamaConfig(**shape, **heads))

    ids = torch.randint(0, VOCAB, (64, SEQ), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    plan = TrainingPlan(
        total_steps=steps,
        batch=BatchPlan(global_windows=windows, micro_batch=2, accumulation=windows // 2 // world.size),
        learning_rate=1e-4,
        checkpoint_every=10**6,
        strategy="fsdp2" if system == "fsdp2" else "ddp",
    )
    objective = Objective(LocalTeacher(model(1), v_eff=VOCAB), LossSettings(), v_eff=VOCAB)
    sink = MetricsSink(folder / "metrics.jsonl" if world.is_first else None)
    fit(model(2), objective, data, plan, work=folder, stage=system, metrics=sink)
    if world.size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def run(system: str, size: str, windows: int) -> list[dict[str, float]]:
    """Lines of the metrics file of one run."""
    folder = Path(tempfile.mkdtemp(prefix="scaling-"))
    own = [str(Path(__file__).resolve()), "--worker", str(folder), system, size, str(windows)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *(torchrun if system != "one" else []), *own],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    return lines


def step_times(lines: list[dict[str, float]]) -> list[float]:
    """Seconds of each step after the warm-up."""
    ends = [line["seconds"] for line in lines]
    return [after - before for before, after in zip(ends[WARM_UP:], ends[WARM_UP + 1 :])]


def main() -> None:
    """Compare the losses, then time the systems in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="default")
    parser.add_argument("--full", dest="size", action="store_const", const="full")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", nargs=4, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        folder, system, size, windows = given.worker
        work(Path(folder), system, size, int(windows))
        return
    # the whole batch in one process: the losses that two ranks must give (law 1)
    truth = [line["loss"] for line in run("one", given.size, WINDOWS)]
    hidden, layers, _ = SIZES[given.size]
    case = f"{layers}x{hidden}, {WINDOWS} windows of {SEQ}"
    rows: list[Row] = []
    times: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for turn in range(3):
        for system in SYSTEMS:
            # half the windows for the one process: then a rank does the same work in all systems
            lines = run(system, given.size, WINDOWS // 2 if system == "one" else WINDOWS)
            times[system] += step_times(lines)
            if system != "one" and turn == 0:
                worst = max(abs(line["loss"] - loss) / abs(loss) for line, loss in zip(lines, truth, strict=True))
                # sums in another order, in fp32
                if worst > 1e-5:
                    raise SystemExit(f"{system} does not give the losses of one process (relative difference {worst:.2g})")
    base = statistics.median(times["one"])
    for system in SYSTEMS:
        median = statistics.median(times[system])
        rows.append(Row(case, "one, half the batch" if system == "one" else f"two ranks, {system}", "seconds_ratio", median / base, "x"))
    report(rows, "step time against one rank with half the batch", given.json)


if __name__ == "__main__":
    main()
