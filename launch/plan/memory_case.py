"""Settings that determine the memory of a training stage, apart from the shapes of its models."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...models.settings import LoadIn, Placement

if TYPE_CHECKING:
    from ...qat.scheme import QuantScheme
    from ...trainer.plan import TrainingPlan


@dataclass(frozen=True, kw_only=True)
class FeatureCase:
    """What a stage's loss compares besides predictions."""

    pairs: int
    """Pairs of layers whose hidden states are compared; 0 for none."""
    teacher_layers: int
    """Layers of the teacher among them."""
    relations: int
    """Pairs of layers whose relations are compared; 0 for none."""
    vectors: str
    """Letters of the vectors that relations read: q, k, v."""
    heads: int
    """Relation heads."""


@dataclass(frozen=True, kw_only=True)
class StageMemoryCase:
    """Settings that determine the memory of a stage, apart from shapes."""

    plan: "TrainingPlan"
    seq_length: int
    ranks: int
    on_gpu: bool
    load_in: LoadIn = "bf16"
    """Storage type of the teacher's weights."""
    placement: Placement = "replicated"
    """Placement of the teacher's weights."""
    scheme: "QuantScheme | None" = None
    """Quantization scheme of the student in a qat stage."""
    learned_scales: bool = False
    """Whether a qat stage trains a scale per group."""
    codes_only: bool = False
    """Whether quantized weights are one-byte codes and only scales train."""
    rank: int = 0
    """Rank of the adapters that train instead of the weights; 0: none."""
    own_loss: bool = False
    """Whether the divergence is imported code, which no fused kernel computes."""
    nodes: int = 1
    """Machines that the ranks are on."""
    scored: bool = False
    """Whether the weights of the decoder's linears have movement scores."""
    rounds_inputs: bool = False
    """Whether quantized linears of the decoder layers read rounded inputs in a qat stage."""
    keeps_outliers: bool = False
    """Whether outliers of these inputs stay unrounded."""
    features: FeatureCase | None = None
    """What the loss compares besides predictions; None = nothing."""
    drawn: int = 0
    """Bytes that drawing samples takes beside weights and moments; 0 without samples."""

    @property
    def tokens(self) -> int:
        """Return the tokens per micro-batch."""
        return self.plan.batch.micro_batch * self.seq_length

    @property
    def sharded(self) -> bool:
        """Return whether the student is sharded over ranks."""
        # alone, a process shards nothing
        return self.plan.strategy != "ddp" and self.ranks > 1

    @property
    def shares(self) -> int:
        """Return the number of ranks that hold the student together; 1 if each holds it whole."""
        if not self.sharded:
            return 1
        # under hsdp every machine holds all of it
        return self.ranks // self.nodes if self.plan.strategy == "hsdp" else self.ranks

    def gathers_bf16(self, family: str) -> bool:
        """Return whether a sharded student of this model type gathers its linears as bf16."""
        from ...trainer.processes.strategy import gathers_bf16

        plan = self.plan
        return self.sharded and gathers_bf16(plan.precision, rounded=self.scheme is not None, compiled=plan.compile, family=family)

    @property
    def mixed(self) -> bool:
        """Return whether training uses bf16 autocast over fp32 master weights."""
        return self.plan.precision == "bf16-mixed"
