"""The plan's memory of each GPU for a range of strategies: how docs/scaling.md gets its table. Arithmetic on shapes, no GPU needed.

    python benchmarks/memory_table.py [--gpus 8] [--seq-length 4096] [--json FILE]

The student is the teacher with half its layers, distilled in bf16-mixed with micro-batches of one window and activation checkpointing.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from rows import Row, report

from decoct.configs.architectures import architecture
from decoct.launch.plan.memory import Roles, training_memory
from decoct.launch.plan.memory_case import StageMemoryCase
from decoct.launch.plan.shapes import config_from, config_of, shape_of
from decoct.models.settings import LoadIn, Placement
from decoct.trainer.plan import BatchPlan, TrainingPlan

TEACHERS = {"1.7B": "SmolLM2-1.7B", "8B": "Llama-3.1-8B", "70B": "Llama-3-70B"}
Choice = tuple[str, str, LoadIn, Placement]
CHOICES: tuple[Choice, ...] = (
    ("ddp", "adamw", "bf16", "replicated"),
    ("ddp", "adamw-8bit", "nf4", "replicated"),
    ("fsdp2", "adamw", "bf16", "replicated"),
    ("fsdp2", "adamw", "nf4", "replicated"),
    ("fsdp2", "adamw", "bf16", "sharded"),
    ("fsdp2", "adamw", "bf16", "offloaded"),
    ("fsdp2", "adamw-8bit", "bf16", "sharded"),
)
"""strategy, optimizer, how the teacher is held, where."""


def memory(name: str, choice: Choice, gpus: int, seq_length: int) -> Roles:
    """Bytes by role on each of ``gpus``."""
    strategy, optimizer, load_in, placement = choice
    teacher = shape_of(*config_of(name))
    student = shape_of(config_from({**architecture(name), "num_hidden_layers": teacher.layers // 2}), "")
    plan = TrainingPlan(
        total_steps=1,
        batch=BatchPlan(global_windows=gpus, micro_batch=1, accumulation=1),
        learning_rate=1e-4,
        precision="bf16-mixed",
        activation_checkpointing=True,
        strategy="fsdp2" if strategy == "fsdp2" else "ddp",
        optimizer="adamw-8bit" if optimizer == "adamw-8bit" else "adamw",
    )
    case = StageMemoryCase(plan=plan, seq_length=seq_length, ranks=gpus, on_gpu=True, load_in=load_in, placement=placement)
    return training_memory(student, teacher, case)


def main() -> None:
    """Print the table; with ``--json`` also write its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    table = Table("strategy", "optimizer", "teacher", *(f"{size} (of it the teacher)" for size in TEACHERS))
    rows: list[Row] = []
    for choice in CHOICES:
        cells = []
        for size, name in TEACHERS.items():
            roles = memory(name, choice, given.gpus, given.seq_length)
            cells.append(f"{roles.total / 1e9:.1f} GB ({roles.teacher / 1e9:.1f})")
            rows.append(Row(f"{size} on {given.gpus} GPUs", " ".join(choice), "peak_bytes", roles.total, "B"))
        table.add_row(choice[0], choice[1], f"{choice[2]}, {choice[3]}", *cells)
    Console(width=140).print(table)
    if given.json:
        report(rows, "predicted memory of a GPU", given.json)


if __name__ == "__main__":
    main()
