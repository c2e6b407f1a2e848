"""What decides the memory of a training stage besides the shapes of its models."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...models.settings import LoadIn, Placement

if TYPE_CHECKING:
    from ...qat.scheme import QuantScheme
    from ...trainer.plan import TrainingPlan


@dataclass(frozen=True, kw_only=True)
class StageMemoryCase:
    """What decides the memory of a stage besides the shapes."""

    plan: "TrainingPlan"
    seq_length: int
    ranks: int
    on_gpu: bool
    load_in: LoadIn = "bf16"
    """How the teacher's weights are held."""
    placement: Placement = "replicated"
    """Where they are held."""
    scheme: "QuantScheme | None" = None
    """The scheme that the student trains on, in a qat stage."""
    learned_scales: bool = False
    """A scale parameter for each group, in a qat stage."""
    codes_only: bool = False
    """Quantized weights are codes of a byte, and only scales train."""
    rank: int = 0
    """Rank of the adapters that train instead of the weights; 0 = none."""
    rounds_inputs: bool = False
    """Quantized linears of the decoder layers read rounded inputs, in a qat stage."""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.plan.batch.micro_batch * self.seq_length

    @property
    def sharded(self) -> bool:
        """Whether the student is spread over ranks."""
        return self.plan.strategy == "fsdp2" and self.ranks > 1

    @property
    def mixed(self) -> bool:
        """bf16 autocast over fp32 masters."""
        return self.plan.precision == "bf16-mixed"
