"""Shows the times and the price of a plan: a table with the origin of each time, and what they leave out."""

from typing import TYPE_CHECKING

from ...models.common.terminal_text import counted
from ..terminal.fitting_table import fitting_table
from .duration import LINK_UNKNOWN, NO_SPEED
from .plan_types import Plan
from .units import span

if TYPE_CHECKING:
    from rich.console import Console

_HEADINGS = ("stage", "part", "time", "computing", "communication", "from")
_BESIDE = (
    "communication runs beside computing: that of fsdp2 and of a sharded teacher beside all of a step, that of ddp beside its last "
    "backward pass"
)


def draw_times(plan: Plan, console: "Console") -> None:
    """Print the times of all parts, or in one line that none is known."""
    cost = plan.cost
    if cost.seconds is None:
        # no part at all: a recipe that exports or measures takes no operations that are counted
        if cost.unknown:
            console.print(f"time: not known; {NO_SPEED}", markup=False, highlight=False, soft_wrap=True)
        return
    parts = [(stage.name, one) for stage in plan.stages for one in stage.durations]
    rows = [
        (
            stage,
            one.part,
            "not known" if one.seconds is None else span(one.seconds),
            "-" if one.compute_seconds is None else span(one.compute_seconds),
            "-" if one.communication_seconds is None else span(one.communication_seconds),
            one.origin,
        )
        for stage, one in parts
    ]
    console.print(
        fitting_table(
            "time",
            _HEADINGS,
            rows,
            console.width,
            text=("stage", "part", "from"),
            left_out_first=("communication", "computing"),
            elsewhere="--json has them",
        )
    )
    console.print(cost_line(plan), markup=False, highlight=False, soft_wrap=True)
    if any(one.communication_seconds is not None for _, one in parts):
        console.print(_BESIDE, markup=False, highlight=False, soft_wrap=True)


def cost_line(plan: Plan) -> str:
    """Describe time and price: 'time: about 12.3 h on 8 GPUs, 98.4 GPU hours, 246.00 at 2.5 each; without tokenizing, ...'."""
    cost, machine = plan.cost, plan.machine
    assert cost.seconds is not None
    text = f"time: about {span(cost.seconds)}"
    if cost.gpu_hours is not None:
        text += f" on {counted(machine.gpus * machine.nodes, 'GPU')}, {cost.gpu_hours:,.1f} GPU hours"
    # the price has no currency, and neither has the sum
    if cost.money is not None:
        text += f", {cost.money:,.2f} at {cost.price:g} each"
    # the table names them row by row; this line is the one that is quoted
    unknown_link = any(LINK_UNKNOWN in one.origin for stage in plan.stages for one in stage.durations)
    between = ["communication between machines"] if unknown_link else []
    left_out = [*between, "tokenizing", "evaluation", "checkpoints", "exports", *cost.unknown]
    return f"{text}; without {', '.join(left_out[:-1])} and {left_out[-1]}"
