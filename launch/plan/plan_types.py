"""What a plan says, piece by piece."""

from dataclasses import dataclass, field

from .fitting import Remedy
from .memory import Roles
from .rounding import RoundingPlan
from .serving_stacks import Verdict
from .values import Value

PRECISIONS = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the recipe is to run."""

    gpus: int
    """On each node; 0 = CPU."""
    nodes: int
    processes: int
    """On each node."""
    gpu_memory: int | None
    """Bytes of one GPU; None when there is none, or it is unknown."""

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.processes * self.nodes


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training stage takes."""

    steps: int
    tokens: int
    flop: float
    """Floating point operations: 6 a parameter and token for the student (8 with checkpointing), 2 for the teacher."""
    memory: Roles
    fits: bool | None
    """None when the memory of the device is unknown."""
    remedy: Remedy | None
    """What makes it fit, when it does not and something does."""
    checkpoint_bytes: int
    """Of one; two are kept, and a third is there while it is written."""
    cache_bytes: int = 0
    """Of the teacher's cache, at most."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage."""

    name: str
    kind: str
    shape: str
    parameters: int
    precisions: dict[str, int]
    """Bare bytes of the parameters at each precision."""
    model_bytes: int | None
    """Weight files that the stage writes; None when it writes no model."""
    training: Training | None
    rounding: RoundingPlan | None
    """Of a quantize stage."""
    values: list[Value] = field(repr=False)
    exports: dict[str, int]
    """Format -> bytes of weight files."""
    verdicts: list[Verdict]
    """Whether and how each serving stack will load what this stage exports."""
    refusals: list[str] = field(default_factory=list)
    """What the formats of this stage cannot hold, a sentence each with the remedy."""
    coverage: float | None = None
    """Share of the decoder's weights that the stage prunes, quantizes or packs; None for other stages."""
    not_exported: str = ""
    """Of a stage that quantizes: why no packed format will hold its result; '' when nothing is known against it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe's plan."""

    name: str
    machine: Machine
    teacher: str | None
    student: str
    values: list[Value] = field(repr=False)
    stages: list[StagePlan]
    disk_bytes: int
    """All model folders, three checkpoints of the stage that needs most, and work files of the quantize stage that needs most."""
