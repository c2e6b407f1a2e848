"""What a process of benchmarks/distillation.py does: trains one student, or times steps, and prints figures as JSON."""

import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STEP_TOKENS, SEQ = 2048, 256
TURNS = 30
"""Timed steps of each system."""
CACHES = {"cache_topk": "top_k", "cache_sampled": "sampled", "cache_hybrid": "hybrid"}


class Bench:
    """What all systems share, made or found again in each process."""

    def __init__(self, plain: dict[str, Any], folder: Path) -> None:
        from decoct.configs.loader import recipe_from_dict
        from decoct.launch.run.session import Session
        from decoct.launch.run.starting_point import open_origin
        from decoct.trainer.processes.world import current_world

        self.folder, self.plain = folder, plain
        self.recipe = recipe_from_dict(plain)
        self.origin = open_origin(self.recipe, Session(current_world(), folder / "run"))
        self.teacher_path = None if self.origin.scratch is None else str(self.origin.scratch.model)

    def teacher(self) -> Any:
        """The teacher in fp32."""
        import torch

        from decoct.models.teachers import load_teacher

        assert self.teacher_path is not None
        return load_teacher(self.teacher_path, dtype=torch.float32, v_eff=self.origin.v_eff)

    def student(self) -> Any:
        """The student before training, in fp32."""
        import torch

        from decoct.models.folder.loading import load_model

        return load_model(self.folder / "run" / "00-student" / "model", dtype=torch.float32)

    def cached(self, mode: Any, wanted: Sequence[int]) -> Any:
        """The teacher's cache of these training windows, filled where it lacks some."""
        from decoct.models.settings import CacheSettings
        from decoct.trainer.soft_targets.cached import CachedTeacher, row_format
        from decoct.trainer.soft_targets.capture import capture, missing_windows
        from decoct.trainer.soft_targets.store import open_store

        windows = self.origin.data.train
        form = row_format(CacheSettings(mode=mode), self.origin.v_eff, 1.0)
        # the cache is kept between processes: the teacher reads each window once for all seeds
        store = open_store(self.folder / mode, {"bytes_per_token": form.bytes})
        store.refresh()
        missing = missing_windows(store, windows, wanted)
        if missing:
            list(capture(self.teacher(), windows, missing, store, form))
            store.refresh()
        return CachedTeacher(store, form, "the teacher")

    def objective(self, system: str, wanted: Sequence[int]) -> Any:
        """What a system minimises, on these windows."""
        from decoct.losses.settings import LossSettings
        from decoct.trainer.loop.objective import Objective

        settings = {"cross_entropy": LossSettings(hard_weight=1.0), "reverse_kl": LossSettings(divergence="reverse_kl")}
        teacher = None if system == "cross_entropy" else self.cached(CACHES[system], wanted) if system in CACHES else self.teacher()
        return Objective(teacher, settings.get(system, LossSettings()), v_eff=self.origin.v_eff)

    def learning_rate(self, student: Any) -> float:
        """That of a distill stage."""
        from decoct.trainer.learning_rates import default_learning_rate

        return default_learning_rate("distill", student.config.hidden_size)


def train(bench: Bench, system: str, seed: int, tokens: int) -> dict[str, float]:
    """Train and measure one student."""
    from decoct.trainer.evaluation.figures import evaluate_model

    student = bench.student()
    run = train_trl if system == "trl" else train_decoct
    student, speed, extra = run(bench, student, system, seed, -(-tokens // STEP_TOKENS))
    # the teacher is opened again, whatever the system learned from: all are measured against the same one
    seen = evaluate_model(student, bench.teacher(), bench.origin.data.evaluation, device="cpu")
    return {"perplexity": seen.perplexity, "kl": seen.kl or 0.0, "top1": seen.top1 or 0.0, "tokens_per_second": speed, "extra_bytes": extra}


def train_decoct(bench: Bench, student: Any, system: str, seed: int, steps: int) -> tuple[Any, float, float]:
    """(trained student, tokens a second, peak bytes beyond the models)."""
    from decoct.trainer.loop.fit import fit
    from decoct.trainer.loop.metrics import MetricsSink
    from decoct.trainer.plan import BatchPlan, TrainingPlan
    from decoct.trainer.soft_targets.fill import stage_windows

    windows = bench.origin.data.train
    batch = BatchPlan(global_windows=STEP_TOKENS // SEQ, micro_batch=STEP_TOKENS // SEQ, accumulation=1)
    plan = TrainingPlan(
        total_steps=steps,
        batch=batch,
        learning_rate=bench.learning_rate(student),
        warmup=0.05,
        schedule="cosine",
        precision="32",
        seed=seed,
        # never: a save would count in the time of a step
        checkpoint_every=10**9,
    )
    objective = bench.objective(system, stage_windows(plan, windows))
    with tempfile.TemporaryDirectory() as work:
        sink = MetricsSink(Path(work) / "metrics.jsonl")
        before = reset_peak()
        fit(student, objective, windows, plan, work=Path(work), stage=system, metrics=sink)
        extra = status("VmHWM") - before
        ends = [json.loads(line)["seconds"] for line in (Path(work) / "metrics.jsonl").read_text().splitlines()]
    return student, speed(ends), extra


def train_trl(bench: Bench, student: Any, system: str, seed: int, steps: int) -> tuple[Any, float, float]:
    """The same by TRL's GKD trainer at beta 0, which is forward KL, on the same windows in the same order."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # pyright: ignore[reportMissingImports]

    from decoct.trainer.data.order import StepBatches

    windows = bench.origin.data.train
    size = STEP_TOKENS // SEQ
    order = StepBatches(windows, global_batch=size, micro_batch=size, rank=0, world=1, seed=seed, start_step=0, total_steps=steps)
    wanted = [index for part in order for index in part]
    rows = Dataset.from_dict({"index": wanted})
    times: list[float] = []

    def collate(items: list[dict[str, int]]) -> dict[str, Any]:
        parts = [windows[item["index"]] for item in items]
        return {key: torch.stack([part[key] for part in parts]) for key in ("input_ids", "labels", "attention_mask")}

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    class InOrder(GKDTrainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            # the order is already in the rows; a shuffle of the trainer's own would give it other batches than ours
            return torch.utils.data.SequentialSampler(rows)  # pyright: ignore[reportArgumentType]

    with tempfile.TemporaryDirectory() as work:
        settings = GKDConfig(
            output_dir=work,
            max_steps=steps, per_device_train_batch_size=size, learning_rate=bench.learning_rate(student), seed=seed,
            # the same schedule as ours: warm-up over a twentieth of the steps, cosine to a tenth of the peak
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1}, warmup_steps=max(1, steps // 20),
            adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0,
            bf16=False, use_cpu=True, report_to=[], save_strategy="no",
            # lmbda=0 and seq_kd=False: it learns on the text, not on what a model generates
            lmbda=0.0, beta=0.0, temperature=1.0, seq_kd=False, remove_unused_columns=False,
            gradient_checkpointing=False, disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True}, logging_strategy="no", max_length=SEQ,
        )  # fmt: skip
        trainer = InOrder(
            model=student, teacher_model=bench.teacher().model, args=settings, train_dataset=rows, data_collator=collate,
            processing_class=bench.origin.tokenizer, callbacks=[Clock()],
        )  # fmt: skip
        before = reset_peak()
        trainer.train()
        extra = status("VmHWM") - before
    student.config.use_cache = False
    return student, speed(times), extra


def speed(ends: list[float]) -> float:
    """Tokens a second of the median step, from the times at which steps ended; the first ones do not count."""
    return STEP_TOKENS / statistics.median(after - before for before, after in itertools.pairwise(ends[3:]))


def step_seconds(bench: Bench, turns: int) -> dict[str, float]:
    """Median seconds of an optimizer step of 2,048 tokens, the systems in turn on the same batches; two more turns come first."""
    import torch

    windows = bench.origin.data.train
    size = STEP_TOKENS // SEQ
    steps: dict[str, Callable[[dict[str, Any]], None]] = {}
    seen_windows = range((turns + 2) * size)
    # all systems stay in memory and take turns, so that a slow spell of the machine falls on each of them
    for system in ("cross_entropy", "forward_kl", *CACHES):
        student, objective = bench.student().train(), bench.objective(system, seen_windows)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

        # as defaults: a closure would see the last system of the loop
        def step(batch: dict[str, Any], student: Any = student, objective: Any = objective, optimizer: Any = optimizer) -> None:
            sums = objective(student, batch)
            (sums.loss / sums.tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[system] = step
    seen: dict[str, list[float]] = {system: [] for system in steps}
    for turn in range(turns + 2):
        parts = [windows[turn * size + row] for row in range(size)]
        batch = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
        for system, step in steps.items():
            begun = time.perf_counter()
            step(batch)
            # the first steps also fill caches and allocate the optimizer's moments
            if turn >= 2:
                seen[system].append(time.perf_counter() - begun)
    return {system: statistics.median(values) for system, values in seen.items()}


def reset_peak() -> int:
    """Forget the peak so far; returns the memory in use, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> int:
    """A figure of this process's memory in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def worker(told: str) -> None:
    """A worker's whole life: prints its figures as JSON."""
    import torch

    torch.set_num_threads(1)
    folder, plain, kind, *rest = json.loads(told)
    # stdout carries the figures alone; whatever libraries print must not mix with the JSON
    with contextlib.redirect_stdout(sys.stderr):
        bench = Bench(plain, Path(folder))
        figures = step_seconds(bench, *rest) if kind == "steps" else train(bench, kind, *rest)
    print(json.dumps(figures))


if __name__ == "__main__":
    worker(sys.argv[1])
