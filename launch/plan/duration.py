"""How long the parts of a run take, and what they cost, from operations, bytes and the speed of the GPUs.

A time stands only where it is known: from a speed that was measured, or from the peak of a GPU that is named or found. It is then

    operations / (GPUs x peak x efficiency) + communication that nothing hides

with a peak for each arithmetic. ``EFFICIENCY`` is an assumption, not a measurement of decoct. Communication of fsdp2 and of a sharded
teacher is taken to run beside all computing of a step (both fetch the next layer while one computes), that of ddp beside the backward pass
of the last micro-batch alone. What is longer than that is added.

Not counted: tokenizing, evaluation, checkpoints, exports, a scratch teacher's training, and waiting.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .gpus import Gpu
from .traffic import Traffic
from .work import Work

EFFICIENCY = 0.4
"""Assumed share of a GPU's peak in matrix products that training reaches (model FLOPs utilization). Published runs: 46 % for PaLM 540B on
TPU v4 (arXiv 2204.02311, table 3), 38 to 43 % for Llama 3 405B on H100 (arXiv 2407.21783, table 4). Small models and small micro-batches
reach less."""
LINK_UNKNOWN = "; without communication between machines, whose speed is not known (--link)"
NO_SPEED = "no GPU is named (--gpu) and no speed was measured (--tokens-per-second)"

Part = Literal["training", "cache", "rounding", "sampling", "imported code"]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a user, the machine or an earlier start says of speed and price."""

    gpu: Gpu | None = None
    efficiency: float = EFFICIENCY
    link: float | None = None
    """Bytes per second that a GPU sends to others; None: ``gpu``'s own, within one machine."""
    tokens_per_second: float | None = None
    """Measured speed of the first training stage, over all processes."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """Stage -> tokens per second that an earlier start of this run logged."""
    price: float | None = None
    """Price of one GPU for an hour."""

    def seconds(self, work: Work, gpus: int) -> float | None:
        """Return the seconds of computing on so many GPUs; None without a GPU."""
        if self.gpu is None:
            return None
        # products of both kinds follow each other, each at its own peak
        return (work.bf16 / self.gpu.bf16 + work.fp32 / self.gpu.fp32) / (gpus * self.efficiency)


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Time of one part of a stage."""

    part: Part
    seconds: float | None
    """None if it is not known."""
    compute_seconds: float | None = None
    """Computing alone; None for a measured speed, in which communication is."""
    communication_seconds: float | None = None
    """Communication alone, hidden or not; None if the link is not known."""
    origin: str
    """How it is known, or what is missing."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """An optimizer step of a training stage, for ``training_durations``."""

    stage: str
    steps: int
    tokens: int
    """Tokens per step, over all processes."""
    work: Work
    """Operations per token."""
    beside: Work
    """Operations per step and process beside which the gradients' all-reduce of ddp runs: the last micro-batch's backward pass."""
    traffic: Traffic


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Time and price of a whole run."""

    seconds: float | None
    """Sum over the parts whose time is known; None if that of none is."""
    unknown: list[str]
    """Parts whose time is not known: '03-quantize, rounding'."""
    gpu_hours: float | None
    """GPUs x hours, all GPUs being held all the time; None without GPUs or a known time."""
    price: float | None = None
    """Price of one GPU for an hour."""
    money: float | None = None
    """``gpu_hours`` x ``price``, in the currency of the price."""
    gpu: str | None = None
    """GPU whose peak was taken."""
    efficiency: float | None = None
    """Share of the peak that was taken."""


def training_duration(step: Step, speed: Speed, *, nodes: int, reference: "Reference | None") -> Duration:
    """Return the time of a training stage.

    Args:
        step: One step.
        speed: What is known of speed.
        nodes: Machines.
        reference: Stage whose speed was measured, for stages without a measurement of their own.
    """
    tokens = step.steps * step.tokens
    # a stage's own measurement needs no assumption, so it comes first
    if rate := speed.measured.get(step.stage):
        return Duration(part="training", seconds=tokens / rate, origin=f"{rate:,.0f} tokens/s, as this run has logged")
    if reference is not None:
        # what takes twice the operations takes twice the time
        seconds = tokens / reference.rate * reference.cost(step.work, speed.gpu) / reference.cost(reference.work, speed.gpu)
        told = "" if step.stage == reference.stage else f"from {reference.stage}, by operations: "
        return Duration(part="training", seconds=seconds, origin=f"{told}{tokens / seconds:,.0f} tokens/s, {reference.origin}")
    # the ranks share the tokens of a step
    compute = speed.seconds(step.work * step.tokens, step.traffic.ranks)
    if compute is None or speed.gpu is None:
        return Duration(part="training", seconds=None, origin=NO_SPEED)
    origin = f"{speed.efficiency:.0%} of the peak of {speed.gpu.name}"
    # a GPU's own link reaches the GPUs of its machine alone
    link = speed.link if speed.link is not None else speed.gpu.link if nodes == 1 else None
    # a single process, or nothing that is exchanged
    if not step.traffic.sent:
        return Duration(part="training", seconds=step.steps * compute, compute_seconds=step.steps * compute, origin=origin)
    # left out and said, not guessed: nothing is known of the network between machines
    if link is None:
        origin += LINK_UNKNOWN
        return Duration(part="training", seconds=step.steps * compute, compute_seconds=step.steps * compute, origin=origin)
    # what stays in a machine goes at its own speed, where that is known
    inside = step.traffic.sent_inside
    communication = (step.traffic.sent - inside) / link + inside / (speed.gpu.link or link)
    reduced = step.traffic.sent_reduced / link
    # gradients are complete only in the last backward pass; weights are fetched all the time
    waits = max(0.0, reduced - (speed.seconds(step.beside, 1) or 0.0)) + max(0.0, communication - reduced - compute)
    return Duration(
        part="training",
        seconds=step.steps * (compute + waits),
        compute_seconds=step.steps * compute,
        communication_seconds=step.steps * communication,
        origin=f"{origin}, {link / 1e9:g} GB/s between GPUs",
    )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A training stage whose speed was measured."""

    stage: str
    rate: float
    """Tokens per second."""
    work: Work
    """Operations per token."""
    origin: str

    @staticmethod
    def cost(work: Work, gpu: Gpu | None) -> float:
        """Return the operations in units of bf16 ones; without a known GPU both kinds count the same."""
        # an fp32 operation weighs as many bf16 ones as the GPU does in its time
        return work.total if gpu is None else work.bf16 + work.fp32 * gpu.bf16 / gpu.fp32


def reference_of(steps: list[Step], speed: Speed) -> Reference | None:
    """Return the stage by which others are timed: that of ``--tokens-per-second``, or the first that this run has logged."""
    # what the user gives counts more than what an earlier start has logged
    if speed.tokens_per_second is not None and steps:
        first = steps[0]
        return Reference(stage=first.stage, rate=speed.tokens_per_second, work=first.work, origin="as given (--tokens-per-second)")
    for step in steps:
        if rate := speed.measured.get(step.stage):
            return Reference(stage=step.stage, rate=rate, work=step.work, origin="as this run has logged")
    return None


def work_duration(part: Part, work: Work, speed: Speed, gpus: int) -> Duration:
    """Return the time of work without communication: a teacher's cache on all GPUs, or rounding on one."""
    seconds = speed.seconds(work, gpus)
    if seconds is None or speed.gpu is None:
        return Duration(part=part, seconds=None, origin="no GPU is named (--gpu)")
    shared = f" on {gpus} GPUs" if gpus > 1 else " on one GPU"
    return Duration(
        part=part, seconds=seconds, compute_seconds=seconds, origin=f"{speed.efficiency:.0%} of the peak of {speed.gpu.name}{shared}"
    )


def reading_duration(part: Part, work: Work, read: float, speed: Speed, gpus: int) -> Duration:
    """Return the time of drawing text, whose every step reads all weights of the model.

    Args:
        part: Name of the part.
        work: Operations over all GPUs.
        read: Bytes that each GPU reads.
        speed: What is known of speed.
        gpus: GPUs that share the operations.
    """
    seconds = speed.seconds(work, gpus)
    if seconds is None or speed.gpu is None:
        return Duration(part=part, seconds=None, origin="no GPU is named (--gpu)")
    # added up: a step of few texts waits for the weights, one of many for the products
    seconds += read / (speed.gpu.bandwidth * speed.efficiency)
    told = f"{speed.efficiency:.0%} of the peak and of the memory bandwidth of {speed.gpu.name}"
    return Duration(part=part, seconds=seconds, compute_seconds=seconds, origin=told)


def run_cost(durations: Mapping[str, list[Duration]], speed: Speed, gpus: int) -> Cost:
    """Return time and price of a run.

    Args:
        durations: Stage -> its parts.
        speed: The price, and what the times were made of.
        gpus: GPUs of all machines; 0 on a CPU.
    """
    parts = [(stage, one) for stage, found in durations.items() for one in found]
    known = [one.seconds for _, one in parts if one.seconds is not None]
    # a sum over what is known; ``unknown`` names the rest, so that the sum is not read as the whole
    seconds = sum(known) if known else None
    # all GPUs are paid for while one of them rounds alone
    hours = None if seconds is None or not gpus else seconds / 3600 * gpus
    return Cost(
        seconds=seconds,
        unknown=[f"{stage}, {one.part}" for stage, one in parts if one.seconds is None],
        gpu_hours=hours,
        price=speed.price,
        money=None if hours is None or speed.price is None else hours * speed.price,
        gpu=speed.gpu.name if speed.gpu else None,
        efficiency=speed.efficiency if speed.gpu else None,
    )
