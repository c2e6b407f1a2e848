"""Bytes that processes exchange in an optimizer step, from shapes alone.

What is handed to collectives (``tests/launch/plan/test_traffic.py`` compares it with what 1, 2 and 4 processes really hand over):

- ddp: one all-reduce of the fp32 gradients per step, in the last micro-batch;
- fsdp2: in every micro-batch an all-gather of all weights for the forward pass, one of the decoder layers for the backward pass (what
  is outside them stays gathered), and a reduce-scatter of all fp32 gradients. The layers' linears are gathered as bf16 where nothing is
  rounded under bf16-mixed, all else as fp32. Rows are padded to a multiple of the processes;
- hsdp: the same among the processes of a machine, and between machines one all-reduce per step of each process's share of the gradients;
- a sharded teacher: in every micro-batch an all-gather of its decoder layers, in its own dtype.

Sums of losses and norms are a few hundred bytes and are not counted, nor are evaluation, checkpoints and the broadcast at the start.

What a process sends of it with n processes, by rings (Patarasuk and Yuan 2009, J. Parallel Distrib. Comput. 69): 2 (n - 1) / n of an
all-reduce, and (n - 1) / n of an all-gather's result or a reduce-scatter's input.
"""

from dataclasses import dataclass
from math import prod

from .memory import added_parameters
from .memory_case import StageMemoryCase
from .shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes handed to collectives in an optimizer step, by each process."""

    ranks: int
    all_reduce: int = 0
    """Gradients."""
    all_gather: int = 0
    """Whole tensors that result."""
    reduce_scatter: int = 0
    """Whole gradients that go in."""
    shares: int | None = None
    """Processes of a machine, which gather and scatter among themselves, under hsdp on several; None = all processes do."""
    taught: int = 0
    """The part of ``all_gather`` that is a sharded teacher's, of which all processes hold a share."""

    @property
    def sent(self) -> float:
        """Return the bytes that each process sends to others."""
        return self.sent_reduced + self.sent_inside + self._by_ring(self.taught if self.shares else self._gathered)

    @property
    def sent_reduced(self) -> float:
        """Return the part of ``sent`` that is all-reduces of gradients."""
        groups = self.ranks if self.shares is None else self.ranks // self.shares
        return (groups - 1) / groups * 2 * self.all_reduce

    @property
    def sent_inside(self) -> float:
        """Return the part of ``sent`` that never leaves a machine, however many there are."""
        return 0.0 if self.shares is None else (self.shares - 1) / self.shares * (self._gathered - self.taught)

    @property
    def _gathered(self) -> int:
        return self.all_gather + self.reduce_scatter

    def _by_ring(self, count: int) -> float:
        return (self.ranks - 1) / self.ranks * count


def step_traffic(student: ModelShape, teacher: ModelShape | None, case: StageMemoryCase) -> Traffic:
    """Return the traffic of an optimizer step."""
    if case.ranks == 1:
        return Traffic(ranks=1)
    # FSDP2 and a sharded teacher drop what they gathered, so each micro-batch gathers again
    micro_batches = case.plan.batch.accumulation
    taught = 0
    if teacher is not None and case.placement == "sharded":
        # its decoder layers, in its own dtype; the rest of it is whole in every process
        taught = micro_batches * (4 if case.load_in == "fp32" else 2) * _padded(teacher, case.ranks, inside=True)
    added = added_parameters(student, case)
    # weights without a gradient are gathered, but never reduced
    frozen = case.codes_only or case.rank > 0
    if not case.sharded:
        return Traffic(ranks=case.ranks, all_reduce=4 * (added + (0 if frozen else student.parameters)), all_gather=taught)
    # scales and adapters belong to linears of the layers; their padding is too little to count
    layers, outside = _padded(student, case.shares, inside=True) + added, _padded(student, case.shares, inside=False)
    gathered = 4 * 2 * layers
    if case.gathers_bf16(student.family.model_type):
        low = _padded(student, case.shares, inside=True, linears=True)
        # what is no linear is a few numbers, and stays gathered
        gathered = 2 * 2 * low + 4 * (layers - low)
    reduced = added if frozen else layers + outside
    several = case.shares < case.ranks
    return Traffic(
        ranks=case.ranks,
        # each process's share, between machines
        all_reduce=4 * reduced // case.shares if several else 0,
        all_gather=micro_batches * (gathered + 4 * outside) + taught,
        reduce_scatter=micro_batches * 4 * reduced,
        shares=case.shares if several else None,
        taught=taught,
    )


def _padded(model: ModelShape, ranks: int, *, inside: bool, linears: bool = False) -> int:
    """Return the elements in the decoder layers, or outside them, with the first dimension padded to a multiple of the processes.

    ``linears``: only those of linears.
    """
    shapes = (
        shape
        for name, shape in model.tensors.items()
        if model.within(name) is inside and (not linears or name.rpartition(".")[0] in model.linears)
    )
    # rounded up, as FSDP2 pads the first dimension
    return sum(-(-shape[0] // ranks) * ranks * prod(shape[1:]) for shape in shapes)
