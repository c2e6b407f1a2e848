"""The data types of a plan."""

from dataclasses import dataclass, field

from .duration import Cost, Duration
from .fitting import Remedy
from .memory import Roles
from .rounding import RoundingPlan
from .sampling_cost import Sampling
from .serving_stacks import Verdict
from .values import Value

PRECISIONS = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machines that the recipe will run on."""

    gpus: int
    """GPUs per node; 0: CPU."""
    nodes: int
    processes: int
    """Processes per node."""
    gpu_memory: int | None
    """Bytes of one GPU; None without a GPU or if unknown."""

    @property
    def ranks(self) -> int:
        """Return the total number of processes."""
        return self.processes * self.nodes


@dataclass(frozen=True, kw_only=True)
class Training:
    """Resources of a training stage."""

    steps: int
    tokens: int
    flop: float
    """Floating point operations of the stage, by the rule of ``work``, without filling a cache."""
    memory: Roles
    fits: bool | None
    """Whether the stage fits the device; None if its memory is unknown."""
    remedy: Remedy | None
    """Settings that make it fit; None if it fits, or if nothing helps."""
    checkpoint_bytes: int
    """Bytes of one checkpoint."""
    checkpoints: int = 3
    """Most checkpoints that exist at a time."""
    cache_bytes: int = 0
    """Largest size of the teacher's cache in bytes."""
    cache: str = ""
    """What a token takes in it, and what follows from it; '' without one."""
    sampling: Sampling | None = None
    """Samples that it draws; None without any."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Plan of one stage."""

    name: str
    kind: str
    shape: str
    parameters: int
    precisions: dict[str, int]
    """Bare bytes of the parameters at each precision."""
    model_bytes: int | None
    """Bytes of the weight files that the stage writes; None if it writes no model."""
    training: Training | None
    rounding: RoundingPlan | None
    """Resources of rounding, for a stage that rounds weights."""
    values: list[Value] = field(repr=False)
    exports: dict[str, int]
    """Format -> bytes of weight files."""
    verdicts: list[Verdict]
    """Whether and how each serving stack will load the exports of this stage."""
    refusals: list[str] = field(default_factory=list)
    """What the formats of this stage cannot hold, one sentence each with the remedy."""
    notes: list[str] = field(default_factory=list)
    """Settings that can never act in this stage, and shapes that servers pad or read otherwise: one sentence each with the remedy."""
    coverage: float | None = None
    """Share of the decoder's weights that the stage prunes, quantizes or packs; None for other stages."""
    not_exported: str = ""
    """For a quantizing stage: why no packed format will hold its result; '' if no reason is known."""
    durations: list[Duration] = field(default_factory=list)
    """Times of its parts, as far as they take operations that are counted."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe's plan."""

    name: str
    machine: Machine
    teacher: str | None
    student: str
    values: list[Value] = field(repr=False)
    stages: list[StagePlan]
    cost: Cost
    """Time and price of the run."""
    tokenized_bytes: int | None
    """Largest size of the tokenized text in the cache folder, which is not part of ``disk_bytes``; None if no bound is known."""
    disk_bytes: int
    """All model folders and caches, the checkpoints of the largest training stage, and work files of the largest quantize stage."""
    imports: list[str] = field(default_factory=list)
    """Files of the user's that the recipe runs, each with what it registers."""
