"""Shows a plan: the long form in tables, the short form at the start of `decoct run`, and JSON."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...models.capabilities import percent
from ...models.common.terminal_text import counted
from ..terminal.fitting_table import fitting_table
from .fitting import usable
from .plan_types import PRECISIONS, Plan, StagePlan
from .problems import problems
from .time_table import cost_line, draw_times
from .units import amount, shown_value, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .rounding import RoundingPlan
    from .sampling_cost import Sampling

_ROLES = ("teacher", "student", "gradients", "optimizer", "activations", "logits")


def machine_line(plan: Plan) -> str:
    """Describe the machine: '2 nodes x 8 GPUs of 85.0 GB'."""
    machine = plan.machine
    what = counted(machine.gpus, "GPU") if machine.gpus else f"{machine.processes} process{'' if machine.processes == 1 else 'es'} on a CPU"
    memory = f" of {size(machine.gpu_memory)}" if machine.gpu_memory else ""
    return (f"{machine.nodes} nodes x " if machine.nodes > 1 else "") + what + memory


def short_form(plan: Plan) -> str:
    """Return a few lines: what each stage costs, and whether it fits."""
    lines = [f"plan for {machine_line(plan)}:", *(f"  runs your code: {line}" for line in plan.imports)]
    for stage in plan.stages:
        if stage.training:
            need = size(stage.training.memory.total)
            state = {True: "fits", False: "does NOT fit", None: "memory unknown"}[stage.training.fits]
            where = f"{need} a GPU, {state}" if plan.machine.gpus else f"about {need} of memory a process"
            lines.append(f"  {stage.name}: {amount(stage.training.tokens)} tokens in {stage.training.steps:,} steps, {where}")
        if stage.training and stage.training.cache:
            lines.append(f"  {stage.name}: teacher's cache: {stage.training.cache}")
        if stage.training and stage.training.sampling:
            lines.append(f"  {stage.name}: {sampling_line(stage.training.sampling)}")
        lines += [f"  {stage.name}: {note}" for note in stage.notes]
        if stage.rounding:
            lines.append(f"  {stage.name}: {'starts with ' if stage.training else ''}{_rounding_line(stage.rounding)}")
        if stage.coverage is not None and stage.kind != "export":
            lines.append(f"  {stage.name}: {coverage_line(stage)}")
        for form, count in stage.exports.items():
            # fast paths only: a stack that unpacks or pads is in the long form
            held = [v.target for v in stage.verdicts if v.format == form and v.outcome == "ok"]
            lines.append(f"  {stage.name}: {form}, {size(count)}" + (f"; loads in {', '.join(held)}" if held else ""))
    lines.append(f"  disk: up to {size(plan.disk_bytes)}")
    if plan.cost.seconds is not None:
        lines.append(f"  {cost_line(plan)}")
    return "\n".join(lines)


def coverage_line(stage: StagePlan) -> str:
    """Describe the share of weights that a stage works on: 'quantizes 98.7% of the decoder's weights'."""
    assert stage.coverage is not None
    verb = {"prune": "prunes among", "export": "packs"}.get(stage.kind, "quantizes")
    after = f"; its result cannot be exported: {stage.not_exported}" if stage.not_exported else ""
    return f"{verb} {percent(stage.coverage)} of the decoder's weights{after}"


def _rounding_line(rounding: "RoundingPlan") -> str:
    text = f" on {amount(rounding.tokens)} tokens, {rounding.flop:.2g} FLOP" if rounding.tokens else ""
    state = {True: ", fits", False: ", does NOT fit", None: ""}[rounding.fits]
    gpu = f"{size(rounding.device_bytes)} on a GPU{state}, " if rounding.device_bytes else ""
    streamed = f", layer by layer with {size(rounding.work_bytes)} of work files" if rounding.streamed else ""
    method = f"{rounding.transform} + {rounding.method}" if rounding.transform else rounding.method
    return f"{method}{text}, {gpu}about {size(rounding.host_bytes)} of memory{streamed}"


def sampling_line(sampling: "Sampling") -> str:
    """Describe the samples of a stage: 'draws at most 6.4M tokens, 12,800 steps on each process, 1.2 GB while it draws'."""
    return (
        f"draws samples of at most {amount(sampling.tokens)} tokens in {sampling.steps:,} steps on each process, "
        f"{sampling.work.total:.2g} FLOP, {size(sampling.memory)} of keys, values and logits while it draws"
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain data, with the total memory of each stage."""
    found = asdict(plan)
    for stage, plain in zip(plan.stages, found["stages"]):
        if stage.training:
            # asdict takes fields, and the total is a property
            plain["training"]["memory"]["total"] = stage.training.memory.total
    return {**found, "problems": problems(plan)}


def draw(plan: Plan, console: "Console", *, values: bool = True) -> None:
    """Print the long form of a plan, and what cannot work."""
    console.print(f"[bold]{_safe(plan.name)}[/bold] on {machine_line(plan)}")
    if plan.teacher:
        console.print(f"teacher: {plan.teacher}", markup=False, highlight=False)
    console.print(f"student: {plan.student}", markup=False, highlight=False)
    for line in plan.imports:
        console.print(f"runs your code: {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(_stages(plan, console.width))
    if any(stage.training for stage in plan.stages):
        console.print(_memory(plan, console.width))
    draw_times(plan, console)
    for stage in plan.stages:
        if stage.training and stage.training.cache:
            console.print(f"{_safe(stage.name)}: teacher's cache: {stage.training.cache}", highlight=False, soft_wrap=True)
        if stage.training and stage.training.sampling:
            console.print(f"{_safe(stage.name)}: {sampling_line(stage.training.sampling)}", highlight=False, soft_wrap=True)
        if stage.rounding:
            starts = "starts with " if stage.training else ""
            console.print(f"{_safe(stage.name)}: {starts}{_rounding_line(stage.rounding)}", highlight=False, soft_wrap=True)
        if stage.coverage is not None:
            console.print(f"{_safe(stage.name)}: {coverage_line(stage)}", highlight=False, soft_wrap=True)
        if stage.verdicts:
            console.print(_targets(stage, console.width))
    for stage in plan.stages:
        for note in stage.notes:
            console.print(f"{stage.name}: {note}", markup=False, highlight=False, soft_wrap=True)
    if values:
        console.print(_values(plan, console.width))
    cached = sum(stage.training.cache_bytes for stage in plan.stages if stage.training)
    cache = f", and at most {size(cached)} of the teacher's cache" if cached else ""
    work = ", work files of rounding" if any(stage.rounding and stage.rounding.streamed for stage in plan.stages) else ""
    trained = [stage.training for stage in plan.stages if stage.training]
    most = max(trained, key=lambda training: training.checkpoint_bytes * training.checkpoints, default=None)
    saves = f"and {'four' if most and most.checkpoints == 4 else 'three'} checkpoints of the largest stage"
    console.print(f"disk: up to {size(plan.disk_bytes)}: every model folder and export, {saves}{work}{cache}")
    if plan.tokenized_bytes is not None:
        text = f"at most {size(plan.tokenized_bytes)} of tokenized text, twice that while it is made"
        console.print(f"disk of the cache folder (DECOCT_CACHE): {text}", highlight=False, soft_wrap=True)
    for problem in problems(plan):
        console.print(f"cannot work: {problem}", style="bold red", markup=False, highlight=False, soft_wrap=True)


_ELSEWHERE = "--json has them"


def _stages(plan: Plan, width: int) -> "Table":
    headings = ("stage", "model", "parameters", *PRECISIONS, "writes", "tokens", "steps", "checkpoint", "work")
    rows = []
    for stage in plan.stages:
        trained = stage.training
        written = [size(stage.model_bytes)] if stage.model_bytes else [size(count) for count in stage.exports.values()]
        rows.append(
            (
                stage.name,
                stage.shape,
                amount(stage.parameters),
                *(size(count) for count in stage.precisions.values()),
                ", ".join(written) or "-",
                *(
                    (amount(trained.tokens), f"{trained.steps:,}", size(trained.checkpoint_bytes), f"{trained.flop:.2g} FLOP")
                    if trained
                    else ("-",) * 4
                ),
            )
        )
    return fitting_table(
        "stages",
        headings,
        rows,
        width,
        text=("stage", "model", "writes"),
        # bare sizes first: they follow from the number of parameters. What is written and trained stays to the last
        left_out_first=("fp32", "int8", "int4", "bf16", "checkpoint", "work", "model", "steps"),
        short={"parameters": "params"},
        elsewhere=_ELSEWHERE,
    )


def _memory(plan: Plan, width: int) -> "Table":
    where = "GPU" if plan.machine.gpus else "process"
    rows = []
    for stage in plan.stages:
        if not stage.training:
            continue
        roles, memory = stage.training.memory, plan.machine.gpu_memory
        fits = "unknown" if memory is None else "yes" if stage.training.fits else "no"
        if stage.training.remedy:
            fits += f"; {' '.join(stage.training.remedy.settings)} takes {size(stage.training.remedy.roles.total)}"
        room = f" of {size(usable(memory))}" if memory else ""
        rows.append((stage.name, *(size(getattr(roles, role)) for role in _ROLES), size(roles.total) + room, fits))
    return fitting_table(
        f"memory of each {where}",
        ("stage", *_ROLES, "total", "fits"),
        rows,
        width,
        text=("stage", "fits"),
        # the total and the verdict always stand
        left_out_first=("logits", "gradients", "activations", "optimizer", "student", "teacher"),
        elsewhere=_ELSEWHERE,
    )


def _targets(stage: StagePlan, width: int) -> "Table":
    title = ", ".join(f"{form} {size(count)}" for form, count in stage.exports.items())
    headings = ("served by", "format", "loads", "why", "nearest setting that does")
    rows = [(verdict.target, verdict.format or "-", verdict.outcome, verdict.reason, verdict.fix) for verdict in stage.verdicts]
    return fitting_table(f"{stage.name}: {title}", headings, rows, width, text=headings)


def _values(plan: Plan, width: int) -> "Table":
    headings = ("key", "value", "from")
    rows: list[tuple[str, ...]] = []
    derived = [(stage.name, value) for stage in plan.stages for value in stage.values]
    # a key such as trainer.micro_batch is 'auto' in the recipe and a number in each stage: the number is shown
    overtaken = {value.key for _, value in derived}
    told: dict[str, tuple[str, str]] = {}
    for stage, value in [*(("", v) for v in plan.values if v.key not in overtaken), *derived]:
        shown = shown_value(value.value), value.origin
        # a value of each stage is shown once, and again with the name of a later stage where that has another one
        if value.key not in told or told[value.key][0] != shown[0]:
            rows.append((f"{value.key} ({stage})" if value.key in told else value.key, *shown))
            told[value.key] = shown
    return fitting_table("values", headings, rows, width, text=headings)


def _safe(text: str) -> str:
    from rich.markup import escape

    return escape(text)
