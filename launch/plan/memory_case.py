"""Settings that determine the memory of a training stage, apart from the shapes of its models."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...models.settings import LoadIn, Placement

if TYPE_CHECKING:
    from ...qat.scheme import QuantScheme
    from ...trainer.plan import TrainingPlan


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
    scored: bool = False
    """Whether the weights of the decoder's linears have movement scores."""
    rounds_inputs: bool = False
    """Whether quantized linears of the decoder layers read rounded inputs in a qat stage."""

    @property
    def tokens(self) -> int:
        """Return the tokens per micro-batch."""
        return self.plan.batch.micro_batch * self.seq_length

    @property
    def sharded(self) -> bool:
        """Return whether the student is sharded over ranks."""
        # alone, a process shards nothing
        return self.plan.strategy == "fsdp2" and self.ranks > 1

    @property
    def mixed(self) -> bool:
        """Return whether training uses bf16 autocast over fp32 master weights."""
        return self.plan.precision == "bf16-mixed"
