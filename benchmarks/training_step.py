"""Tokens per second of an optimizer step: decoct's beside the loop that one would write with transformers, doing the same work.

    python benchmarks/training_step.py --model FOLDER [--layers 20] [--precision 32 bf16-mixed] [--turns 5] [--json FILE]

Both distil a student of ``--layers`` of the model's layers from the whole model by forward KL, on the same random tokens, and take turns
step by step in one process, so that load from elsewhere falls on both. The plain loop calls both models, takes KL from their logits,
clips and steps ``torch.optim.AdamW`` at its defaults; with bf16-mixed all of that but the optimizer under ``torch.autocast``. Each system
has one micro-batch a step. ``kl`` is the KL that each system sees in the first turn: equal in fp32.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoct.losses.settings import LossSettings
from decoct.models.folder.loading import load_model
from decoct.models.student import student_by_keeping
from decoct.models.teachers import LocalTeacher
from decoct.trainer.loop.objective import Objective
from decoct.trainer.loop.optimizer import build_optimizer
from decoct.trainer.plan import BatchPlan, TrainingPlan

sys.path.insert(0, str(Path(__file__).parent))
from rows import Row, report

RATE = 1e-6
"""Small: the steps are of interest, and the student should stay what it is."""
Step = Callable[[Tensor], float]
"""Takes an optimizer step on ids [B, S]; returns the mean KL that it saw."""


def plain_step(student: Any, teacher: Any, mixed: bool, device: str) -> Step:
    """The loop of transformers and torch alone."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)

    def step(ids: Tensor) -> float:
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            with torch.no_grad():
                theirs = teacher(input_ids=ids).logits[:, :-1]
            ours = student(input_ids=ids).logits[:, :-1]
            found = torch.log_softmax(ours.flatten(0, 1), -1)
            wanted = torch.log_softmax(theirs.flatten(0, 1), -1)
            loss = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def our_step(student: Any, teacher: Any, mixed: bool, device: str) -> Step:
    """What a training stage does in a step, without Lightning around it."""
    plan = TrainingPlan(total_steps=1, batch=BatchPlan(global_windows=1, micro_batch=1, accumulation=1), learning_rate=RATE)
    optimizer = build_optimizer(student, plan)
    vocabulary = student.get_output_embeddings().weight.shape[0]
    objective = Objective(LocalTeacher(teacher, v_eff=vocabulary), LossSettings(), v_eff=vocabulary)

    def step(ids: Tensor) -> float:
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            sums = objective(student, batch)
        (sums.loss / sums.tokens).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(sums.kl / sums.tokens)

    return step


SYSTEMS: dict[str, Callable[[Any, Any, bool, str], Step]] = {"decoct": our_step, "plain": plain_step}


def seconds(given: argparse.Namespace, precision: str, device: str) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each turn, and the KL of the first step, by system."""
    mixed = precision == "bf16-mixed"
    teacher = load_model(given.model, dtype=torch.bfloat16 if mixed else torch.float32).to(device).eval()  # pyright: ignore
    steps = {}
    for name, make in SYSTEMS.items():
        student, _ = student_by_keeping(teacher, given.layers or teacher.config.num_hidden_layers)
        steps[name] = make(student.to(device).train(), teacher, mixed, device)  # pyright: ignore
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, list[float]] = {name: [] for name in steps}
    first: dict[str, float] = {}
    for turn in range(given.turns + 1):
        rows = max(1, given.tokens // given.seq_length)
        ids = torch.randint(0, teacher.config.vocab_size, (rows, given.seq_length), generator=generator).to(device)
        # who goes first changes, so that neither always finds the caches warm
        for name in sorted(steps, reverse=bool(turn % 2)):
            begun = time.perf_counter()
            kl = steps[name](ids)
            first.setdefault(name, kl)
            # the first turn allocates memory
            if turn:
                seen[name].append(time.perf_counter() - begun)
    return seen, first


def main() -> None:
    """Time the systems and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--layers", type=int, default=None, help="layers of the student; default: all")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a step")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--precision", nargs="+", choices=("32", "bf16-mixed"), default=["32", "bf16-mixed"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    for precision in given.precision:
        seen, first = seconds(given, precision, device)
        tokens = max(1, given.tokens // given.seq_length) * given.seq_length
        case = f"{precision}, {tokens} tokens"
        rows += [Row(case, name, "tokens_per_second", tokens / statistics.median(times), "1/s") for name, times in seen.items()]
        rows += [Row(case, name, "kl", kl, "nats") for name, kl in first.items()]
        ratios = [theirs / ours for ours, theirs in zip(seen["decoct"], seen["plain"], strict=True)]
        rows.append(Row(case, "decoct", "speed beside plain", statistics.median(ratios), "x"))
    report(rows, f"{Path(given.model).name}: an optimizer step on {device}, {torch.get_num_threads()} threads", given.json)


if __name__ == "__main__":
    main()
