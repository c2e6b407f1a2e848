"""One tiny training stage, for tests and for the processes that tests start, kill and start again.

As a script: ``python training_case.py WORK KIND [key=value ...]`` with the options of ``Case``.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from decoct.losses.settings import LossSettings
from decoct.losses.settings_features import FeatureSettings, HiddenSettings, RelationSettings
from decoct.losses.sums import LossSums
from decoct.models.families import decoder_linears
from decoct.models.teachers import LocalTeacher
from decoct.qat.scheme import SpecChange
from decoct.qat.spec import ActivationSpec, QuantSpec
from decoct.trainer.loop import placed_student
from decoct.trainer.loop.features import Features, Wanted
from decoct.trainer.loop.fit import FitResult, TrainingPlan, fit
from decoct.trainer.loop.held_out import HeldOut, derive_watch
from decoct.trainer.loop.hooks import KeepZeros, MaskHook, StepHook
from decoct.trainer.loop.metrics import MetricsSink
from decoct.trainer.loop.movement import MovementHook
from decoct.trainer.loop.objective import Objective
from decoct.trainer.loop.qat_schedule import QatSchedule
from decoct.trainer.loop.samples import Samples, Writers
from decoct.trainer.loop.start_rate import StartRate
from decoct.trainer.plan import BatchPlan
from decoct.trainer.processes.world import current_world
from decoct.trainer.settings_pruning import MagnitudeSettings
from decoct.trainer.settings_quantization import QatSettings
from decoct.trainer.settings_samples import SamplesSettings
from decoct.trainer.settings_sparsity import MovementSettings
from decoct.trainer.settings_watching import EarlyStoppingSettings

VOCAB = 96
SEQ = 16


QUANTIZED = ("learned", "lattices")
"""Kinds that the stage's hook leads."""


def tiny_model(seed: int = 0, *, dropout: float = 0.1, tied: bool = True, layers: int = 2, hidden: int = 32) -> LlamaForCausalLM:
    """A Llama of some 30,000 weights; the same for the same seed."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=dropout,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


class RandomWindows:
    """Windows of random tokens; every third has masked labels and padding at its end, of its own length."""

    seq_length = SEQ

    def __init__(self, count: int = 40, seed: int = 5) -> None:
        self.ids = torch.randint(0, VOCAB, (count, SEQ), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        length = SEQ - (index % 7) if index % 3 == 0 else SEQ
        real = torch.arange(SEQ) < length
        return {"input_ids": ids.clone(), "labels": torch.where(real, ids, -100), "attention_mask": real.long()}


class Pause:
    """Makes steps slow enough to be killed in between; has no state."""

    name = "pause"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Nothing to prepare."""

    def before_step(self, step: int) -> None:
        """Nothing to do."""

    def after_step(self, step: int) -> None:
        """Wait."""
        time.sleep(self.seconds)

    def state(self) -> dict[str, Tensor]:
        """Nothing to keep."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""


class Strike(Pause):
    """Sends one rank a signal after a step, on the first start of a torchrun only: ``step:rank:NAME``."""

    name = "strike"

    def __init__(self, order: str) -> None:
        super().__init__(0.0)
        step, rank, name = order.split(":")
        self.step, self.rank, self.signal = int(step), int(rank), signal.Signals[name]

    def after_step(self, step: int) -> None:
        """Strike."""
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first and step == self.step and current_world().rank == self.rank:
            os.kill(os.getpid(), self.signal)


class Ledger:
    """An objective that writes down which windows it is given, a line a micro-batch: appended to ``ledger-<rank>.txt``."""

    def __init__(self, objective: Objective, work: Path) -> None:
        self.objective = objective
        self.path = work / f"ledger-{current_world().rank}.txt"

    @property
    def has_teacher(self) -> bool:
        """As the objective."""
        return self.objective.has_teacher

    def to(self, device: torch.device) -> "Ledger":
        """Move the objective."""
        self.objective.to(device)
        return self

    def __call__(self, student: Any, batch: Mapping[str, Tensor]) -> LossSums:
        """Note the windows, then compute."""
        with self.path.open("a") as file:
            file.write(" ".join(map(str, batch["index"].tolist())) + "\n")
        return self.objective(student, batch)


@dataclass(frozen=True)
class Case:
    """What a test varies."""

    kind: str = "distill"
    """distill, pretrain, prune (scheduled masks), nm (of a pattern), movement (of scores), sparse (kept zeros), qat (sparse and quantized),
    learned (quantized, own scales) or features (hidden states through projectors, and relations)."""
    steps: int = 24
    windows: int = 8
    micro: int = 4
    ranks: int = 1
    every: int = 5
    rate: float = 3e-3
    clip: float = 1.0
    decay: float = 0.1
    precision: str = "32"
    dropout: float = 0.1
    seed: int = 3
    pause: float = 0.0
    strategy: str = "ddp"
    checkpointing: int = 0
    compile: int = 0
    optimizer: str = "adamw"
    ledger: int = 0
    strike: str = ""
    hidden: int = 32
    watch: int = 0
    """Optimizer steps between evaluations on held-out windows; 0 = never."""
    result: str = "last"
    patience: int = 0
    """Evaluations without a better figure that end the stage; 0 = never."""
    change: float = 0.0
    text: int = 9
    """Held-out windows."""
    warmup: float = 0.05
    start: int = 0
    """1 = the KL of the first step decides the peak rate."""
    gather: str = ""
    """fp32 = weights are never gathered as bf16."""
    samples: str = ""
    """Who writes samples (``from``); '' = nobody."""
    share: float = 0.5
    refresh: int = 3
    draws: int = 64
    """Completions drawn at a time."""
    fresh: int = 6
    """Longest completion."""

    def sampled(self, student: Any, objective: Any, windows: Any, work: Path) -> Samples | None:
        """Samples of the stage; three ids of the vocabulary end a text."""
        if not self.samples:
            return None
        settings = SamplesSettings(
            from_=self.samples,  # pyright: ignore[reportArgumentType]
            share=self.share,
            prompts=4,
            max_new_tokens=self.fresh,
            refresh=self.refresh,
            batch=self.draws,
        )
        ends = [1, 2, 3]
        writers = Writers(v_eff=VOCAB, student_ends=ends, teacher=objective.teacher.model, teacher_ends=ends)
        return Samples(settings, windows, self.plan(), writers, chat=False, folder=work / "stage")

    def held_out(self, objective: Any) -> HeldOut | None:
        """Windows that are never trained on."""
        if not self.watch:
            return None
        text = RandomWindows(self.text, seed=77)
        watch = derive_watch(
            self.watch,
            total_steps=self.steps,
            step_windows=self.windows,
            seq_length=SEQ,
            available=len(text),
            ranks=self.ranks,
            decides=self.result == "best" or self.patience > 0,
        )
        return HeldOut(text, watch, objective.teacher, VOCAB) if watch else None

    def plan(self) -> TrainingPlan:
        """The plan of this case."""
        return TrainingPlan(
            total_steps=self.steps,
            batch=BatchPlan(global_windows=self.windows, micro_batch=self.micro, accumulation=self.windows // self.micro // self.ranks),
            learning_rate=self.rate,
            seed=self.seed,
            precision=self.precision,  # pyright: ignore[reportArgumentType]
            gradient_clip=self.clip,
            weight_decay=self.decay,
            checkpoint_every=self.every,
            strategy=self.strategy,  # pyright: ignore[reportArgumentType]
            activation_checkpointing=bool(self.checkpointing),
            compile=bool(self.compile),
            optimizer=self.optimizer,  # pyright: ignore[reportArgumentType]
            scale_learning_rate=self.rate / 30 if self.kind in QUANTIZED else None,
            warmup=self.warmup,
            rate_from_start=bool(self.start),
            result=self.result,  # pyright: ignore[reportArgumentType]
            early_stopping=EarlyStoppingSettings(patience=self.patience, min_change=self.change) if self.patience else None,
        )

    def student(self) -> LlamaForCausalLM:
        """The student as the stage finds it at every start."""
        student = tiny_model(1, dropout=self.dropout, hidden=self.hidden)
        if self.kind in ("sparse", "qat"):
            for linear in decoder_linears(student).values():
                linear.weight.data[linear.weight.data.abs() < 0.01] = 0.0
        if self.kind == "qat":
            from decoct.qat.layers.quantized_model import prepare

            prepare(student, QuantSpec(bits=4, group_size=16))
        if self.kind in QUANTIZED:
            self.quantize(student, self.quantizing())
        return student

    def quantizing(self) -> QatSettings:
        """The settings of kind 'learned', everything that has a state, and of 'lattices', one of each lattice and a tied table."""
        if self.kind == "lattices":
            return QatSettings(
                steps=self.steps,
                weights=QuantSpec(bits=4, group_size=16, symmetric=False),
                overrides={
                    "*.down_proj": SpecChange(kind="nf4", symmetric=True),
                    "*.o_proj": SpecChange(group_size="tensor"),
                    "*.up_proj": SpecChange(bits=8, symmetric=True, group_size="tensor"),
                },
                embedding=SpecChange(bits=8, symmetric=True),
                anneal_from=6,
                anneal=0.4,
            )
        return QatSettings(
            steps=self.steps,
            weights=QuantSpec(bits=4, group_size=16),
            activations=ActivationSpec(scaling="static"),
            kv_cache=ActivationSpec(kind="fp8_e4m3", scaling="static"),
            delay=0.2,
            anneal_from=6,
            anneal=0.4,
            freeze_scales=0.2,
        )

    @staticmethod
    def quantize(student: LlamaForCausalLM, settings: QatSettings) -> None:
        """Prepare ``student`` as the stage does."""
        from decoct.qat.layers.quant_linear import Extras
        from decoct.qat.layers.quantized_model import prepare

        scale = settings.scales == "learned" or settings.freeze_scales > 0
        prepare(student, settings.scheme, extras=Extras(scale=scale, rank=settings.lora or 0))

    def hooks(self, student: nn.Module) -> list[StepHook]:
        """What acts around each step."""
        hooks: list[StepHook] = [Pause(self.pause)] if self.pause else []
        if self.start:
            hooks.append(StartRate(self.plan(), lambda text: None))
        if self.strike:
            hooks.append(Strike(self.strike))
        linears: dict[str, Any] = decoder_linears(student)  # pyright: ignore[reportArgumentType]
        if self.kind == "prune":
            hooks.append(MaskHook(list(linears), MagnitudeSettings(keep=0.4, update_every=3), self.steps))
        if self.kind == "nm":
            hooks.append(MaskHook(list(linears), MagnitudeSettings(pattern="2:4", update_every=3), self.steps))
        if self.kind == "movement":
            hooks.append(MovementHook(linears, MovementSettings(keep=0.4, update_every=3), self.steps))
        if self.kind in ("sparse", "qat"):
            hooks.append(KeepZeros(linears))
        if self.kind in QUANTIZED:
            hooks.append(quantizers(student, self.quantizing(), self))
        return hooks

    def objective(self) -> Objective:
        """Forward KL to a fixed teacher, or cross-entropy."""
        if self.kind == "features":
            return featured(self.student())
        if self.kind == "pretrain":
            return Objective(None, LossSettings(hard_weight=1.0), v_eff=VOCAB)
        if self.samples:
            return Objective(LocalTeacher(tiny_model(2, dropout=0.0), v_eff=VOCAB), LossSettings(), v_eff=VOCAB)
        return Objective(LocalTeacher(tiny_model(2, dropout=0.0), v_eff=VOCAB), LossSettings(hard_weight=0.25), v_eff=VOCAB)


def featured(student: LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> Objective:
    """An objective with terms on hidden states and relations of a deeper and wider teacher."""
    settings = FeatureSettings(hidden=HiddenSettings(weight=0.5, loss="nmse"), relations=RelationSettings(weight=0.3))
    model: Any = tiny_model(2, dropout=0.0, layers=4, hidden=48)
    teacher = LocalTeacher(model.to(dtype), v_eff=VOCAB)
    features = Features(Wanted(settings=settings, hidden=[(0, 1), (1, 3)], relations=[(1, 3)]), student, teacher, seed=7)
    return Objective(teacher, LossSettings(hard_weight=0.25, features=settings), v_eff=VOCAB, features=features)


def quantizers(student: nn.Module, settings: QatSettings, case: Case, kind: type[QatSchedule] = QatSchedule) -> QatSchedule:
    """The hook of a quantized student, its inputs, keys and values rounded where the settings say so."""
    from decoct.qat.layers.input_hooks import round_inputs
    from decoct.qat.layers.kv_cache_hooks import round_cache
    from decoct.qat.layers.quant_linear import QuantLinear

    names = [name for name, module in student.named_modules() if isinstance(module, QuantLinear)]
    inputs = round_inputs(student, names, settings.activations) if settings.activations else None
    cache = round_cache(student, settings.kv_cache) if settings.kv_cache else None  # pyright: ignore[reportArgumentType]
    return kind(settings, case.steps, case.seed, inputs=inputs, cache=cache)


def run_case(case: Case, work: Path, *, console: Console | None = None, **changes: Any) -> tuple[FitResult, LlamaForCausalLM]:
    """Run (or go on with) the stage in ``work``; ``changes`` replace arguments of ``fit``."""
    student = changes.pop("student", None) or case.student()
    quantizing, hook = changes.pop("quantizing", None), changes.pop("quantizers", QatSchedule)
    if quantizing is not None:
        student = tiny_model(1, dropout=case.dropout, hidden=case.hidden)
        case.quantize(student, quantizing)
        changes["hooks"] = [quantizers(student, quantizing, case, hook)]
    arguments: dict[str, Any] = {
        "work": work / "stage",
        "stage": case.kind,
        "metrics": MetricsSink(work / "metrics.jsonl" if current_world().is_first else None),
        "hooks": case.hooks(student),
        "console": console,
    }
    objective = changes.pop("objective", None) or case.objective()
    if (features := getattr(objective, "features", None)) is not None and features.projectors is not None:
        arguments["hooks"] = [features.projectors, *arguments["hooks"]]
    if case.ledger:
        objective = Ledger(objective, work)
    changes.setdefault("held_out", case.held_out(getattr(objective, "objective", objective)))
    windows = changes.pop("windows", None) or RandomWindows()
    changes.setdefault("samples", case.sampled(student, getattr(objective, "objective", objective), windows, work))
    result = fit(student, objective, windows, case.plan(), **{**arguments, **changes})
    return result, result.student  # pyright: ignore[reportReturnType]


def main() -> None:
    """Run one case as the command line says."""
    from decoct.models.common.errors import DecoctError

    torch.set_num_threads(1)
    work, kind, *options = sys.argv[1:]
    case = Case(kind=kind)
    for option in options:
        key, value = option.split("=")
        case = replace(case, **{key: type(getattr(case, key))(value)})
    if case.gather == "fp32":
        placed_student.gathers_bf16 = lambda *_, **__: False
    if case.compile:
        # the compiler has read the environment of the server of warm processes: its helpers would import torch once more for each rank
        from torch._inductor import config

        config.compile_threads = 1
    Path(work).mkdir(parents=True, exist_ok=True)
    try:
        result, student = run_case(case, Path(work), console=Console(width=200))
    except DecoctError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(f"done: {result.steps} steps, resumed from {result.resumed_from}")
    if current_world().is_first:
        save_model(student, str(Path(work) / "student.safetensors"))
    leave_together()


def leave_together() -> None:
    """End this process of a group after all others have come here; does nothing without a group."""
    if not dist.is_initialized():
        return
    # a rank that leaves while another is still talking to it takes that one down
    dist.barrier()
    time.sleep(0.5)
    # gloo's threads may abort a process whose peers have just closed their connections: nothing is left to tidy up here
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
