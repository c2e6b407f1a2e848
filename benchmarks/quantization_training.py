"""The training part of benchmarks/quantization.py: the stage `qat`, torchao's QAT in the same loop, and what a step of each costs."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from distillation_work import SEQ, STEP_TOKENS, Bench, reset_peak, status

CROSS_ENTROPY = {"loss": {"hard_weight": 1.0}}
SYSTEMS: dict[str, dict[str, Any]] = {
    "qat_ce": {"scales": "absmax", **CROSS_ENTROPY},
    "qat_kl": {"scales": "absmax"},
    "qat_kl_learned": {"scales": "learned"},
    "qat_scales_only": {"train": "scales", "start": "gptq"},
    "torchao": {"scales": "absmax"},
}
"""Settings of the stage. torchao trains by the same settings: its scales too are taken from the weights in every forward."""
STEPS = ("plain", "qat_kl", "qat_kl_learned", "torchao")
BITS, GROUP = 4, 64
"""Lattice of the timed steps."""


def full_model(bench: Bench) -> Any:
    """The model that is quantized, fp32."""
    import torch

    from decoct.models.folder.loading import load_model

    assert bench.teacher_path is not None
    return load_model(bench.teacher_path, dtype=torch.float32)


def quality(bench: Bench, model: Any) -> dict[str, float]:
    """Held-out figures beside the unquantized model in fp32."""
    from decoct.trainer.evaluation.figures import evaluate_model

    seen = evaluate_model(model, bench.teacher(), bench.origin.data.evaluation, device="cpu")
    return {"perplexity": seen.perplexity, "kl": seen.kl or 0.0, "kl_p99": seen.kl_p99 or 0.0, "top1": seen.top1 or 0.0}


def stage(bench: Bench, system: str, bits: int, group: int, tokens: int, work: Path) -> tuple[Any, Any]:
    """(settings, context) of a `qat` stage that starts from the full model and learns from it, as a recipe would give them."""
    from rich.console import Console

    from decoct.configs.loader import recipe_from_dict
    from decoct.launch.run.starting_point import teacher_ref
    from decoct.trainer.loop.metrics import MetricsSink
    from decoct.trainer.stages.context import RunContext, StageContext

    block = {"weights": {"bits": bits, "group_size": group}, "tokens": tokens, "teacher": "input", **SYSTEMS[system]}
    plain = {**bench.plain, "stages": [{"qat": block}]}
    recipe = recipe_from_dict(plain)
    assert bench.teacher_path is not None
    run = RunContext(
        data=bench.origin.data, tokenizer=bench.origin.tokenizer, v_eff=bench.origin.v_eff, trainer=recipe.trainer, seed=recipe.seed,
        teacher=teacher_ref(recipe, bench.origin.scratch), metrics=MetricsSink(work / "metrics.jsonl"),
        console=Console(stderr=True, quiet=True),
    )  # fmt: skip
    context = StageContext(
        run=run, name="00-qat", kind="qat", folder=work, key="benchmark", input=bench.teacher_path, input_revision=None, record={}
    )
    return recipe.stages[0].settings, context


def train(bench: Bench, system: str, bits: int, group: int, tokens: int, rate_share: float = 1.0) -> dict[str, float]:
    """Train and measure; ``rate_share`` times the stage's own learning rate."""
    import torch

    from decoct.models.folder.loading import load_config, load_model
    from decoct.trainer.learning_rates import quantized_rate
    from decoct.trainer.stages import qat

    with tempfile.TemporaryDirectory() as place:
        settings, context = stage(bench, system, bits, group, tokens, Path(place))
        # set by hand, so that a share of the stage's own rate can be tried, and torchao gets the same
        rate = quantized_rate(settings, load_config(str(bench.teacher_path)).hidden_size)
        settings = replace(settings, learning_rate=rate_share * rate)
        before, begun = reset_peak(), time.perf_counter()
        if system == "torchao":
            model = train_torchao(settings, context)
        else:
            qat.start(settings, context)
            qat.finish(settings, context, qat.train(settings, context))
            # the stage has written a folder: what is measured is what was stored, not what was in memory
            model = None
        figures = {"seconds": time.perf_counter() - begun, "extra_bytes": status("VmHWM") - before}
        model = model or load_model(context.model, dtype=torch.float32)
    return {**quality(bench, model), **figures}


def train_torchao(settings: Any, context: Any) -> Any:
    """torchao's fake-quantized linears in our loop; returns the model with the weights that they end in."""
    from decoct.trainer.stages.student_and_teacher import open_student
    from decoct.trainer.stages.training import train_student, training_plan

    student = open_student(settings, context)
    prepare_torchao(student.model, settings.weights.bits, settings.weights.group_size)
    return fold_torchao(train_student(student, settings, context, training_plan(settings, context, student)).student)


def prepare_torchao(model: Any, bits: int, group: int) -> None:
    """Every linear of the decoder layers, symmetric integers in groups, scales in fp32."""
    import torch
    from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig  # pyright: ignore[reportMissingImports]

    from decoct.models.families import decoder_linears

    wanted = set(decoder_linears(model))
    config = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), group_size=group, is_symmetric=True)
    quantize_(model, QATConfig(weight_config=config, step="prepare"), filter_fn=lambda _, name: name in wanted)


def fold_torchao(model: Any) -> Any:
    """Plain linears with the weights that the fake quantizers give."""
    import torch
    from torchao.quantization.qat.linear import FakeQuantizedLinear  # pyright: ignore[reportMissingImports]

    # a list, as the loop replaces modules
    for name, module in list(model.named_modules()):
        if isinstance(module, FakeQuantizedLinear):
            weight = module.weight_fake_quantizer(module.weight).detach()
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = torch.nn.Parameter(weight)
            model.set_submodule(name, plain)
    return model


def step_seconds(bench: Bench, objective: str, systems: list[str], turns: int) -> dict[str, float]:
    """Median seconds of an optimizer step of 2,048 tokens of the distilled student, the systems in turn on the same batches; two more
    turns come first."""
    import torch

    windows = bench.origin.data.train
    size = STEP_TOKENS // SEQ
    # all in one process and in turn, so that load from elsewhere falls on all of them
    steps = {system: stepper(bench, system, objective) for system in systems}
    seen: dict[str, list[float]] = {system: [] for system in systems}
    for turn in range(turns + 2):
        parts = [windows[turn * size + row] for row in range(size)]
        batch = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
        for system, step in steps.items():
            begun = time.perf_counter()
            step(batch)
            if turn >= 2:
                seen[system].append(time.perf_counter() - begun)
    return {system: statistics.median(values) for system, values in seen.items()}


def stepper(bench: Bench, system: str, objective: str) -> Callable[[dict[str, Any]], None]:
    """A function that takes a step on a batch."""
    import torch

    from decoct.qat.layers.quant_linear import Extras
    from decoct.qat.layers.quantized_model import prepare
    from decoct.qat.spec import QuantSpec
    from decoct.trainer.loop.qat_schedule import QatSchedule
    from decoct.trainer.settings_quantization import QatSettings

    student, loss = bench.student().train(), bench.objective(objective, range(0))
    spec = QuantSpec(bits=BITS, group_size=GROUP)
    learned = system == "qat_kl_learned"
    if system == "torchao":
        prepare_torchao(student, BITS, GROUP)
    elif system != "plain":
        prepare(student, spec, extras=Extras(scale=learned))
    # a small rate: the times are of interest, and the student should stay what it is
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    # the schedule sets the first values of the scales, as in a stage
    if learned:
        QatSchedule(QatSettings(weights=spec), 100, 0).on_start(student, optimizer)

    def step(batch: dict[str, Any]) -> None:
        sums = loss(student, batch)
        (sums.loss / sums.tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
