"""The verb `plan`."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.common.byte_amounts import read_bytes
from ...models.common.errors import UserError

if TYPE_CHECKING:
    from ...trainer.settings import LoggerSettings
    from ..plan.duration import Speed


def parse_bytes(text: str, option: str) -> int:
    """Parse '80GB', '24 GiB' or '85899345920' into bytes; UserError for anything else."""
    found = read_bytes(text)
    if found is None:
        raise UserError(f"{option}={text!r} is not an amount of memory; write it as 80GB or 24GiB")
    amount, unit = found
    # a bare 80 is 80 bytes to a computer and gigabytes to everybody else
    if not unit and amount < 10**6:
        raise UserError(f"{option}={text} is {amount:,} bytes; write the unit too: {text.strip()}GB")
    return amount


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The machine, its speed and its price, as options give them."""

    gpus: int | None = None
    nodes: int = 1
    gpu_memory: str | None = None
    tensor_parallel: int = 1
    gpu: str | None = None
    efficiency: float | None = None
    link: str | None = None
    tokens_per_second: str | None = None
    price: float | None = None
    out: Path | None = None


def run_plan(recipe: str, overrides: Sequence[str], asked: Asked, as_json: bool) -> None:
    """Print the plan; then raise UserError (exit code 2) if something cannot work."""
    from ...configs.loader import load_recipe
    from ..plan import show as drawing
    from ..plan.make_plan import plan
    from ..plan.problems import problems
    from ..report.tables import WIDE
    from ..terminal.console import CleanConsole
    from ..terminal.imported_code import tell_imported

    for option, value in (("--gpus", asked.gpus), ("--nodes", asked.nodes), ("--tensor-parallel", asked.tensor_parallel)):
        if value is not None and value < 1:
            raise UserError(f"{option}={value} must be at least 1")
    memory = None if asked.gpu_memory is None else parse_bytes(asked.gpu_memory, "--gpu-memory")
    loaded = load_recipe(recipe, overrides, tell=tell_imported)
    made = plan(
        loaded,
        gpus=asked.gpus,
        gpu_memory=memory,
        nodes=asked.nodes,
        tensor_parallel=asked.tensor_parallel,
        speed=_speed(asked, loaded.name),
    )
    # known only here: without --gpus the plan has looked for GPUs itself
    if asked.price is not None and not made.machine.gpus:
        raise UserError("--price is for one GPU and hour, and this plan is for a CPU; name the GPUs (--gpus 8 --gpu H100)")
    # both describe the work of a GPU that is named or found
    for option, value in (("--efficiency", asked.efficiency), ("--link", asked.link)):
        if value is not None and asked.gpu is None and not made.machine.gpus:
            raise UserError(f"{option} has no effect on a plan for a CPU; name the GPUs (--gpus 8 --gpu H100)")
    found = [*problems(made), *_untracked(loaded.logger, asked)]
    if as_json:
        print(json.dumps({**drawing.as_json(made), "problems": found}, indent=1))
    else:
        console = CleanConsole()
        # a pipe has no width: nothing is left out there
        if not console.is_terminal:
            console.width = max(console.width, WIDE)
        # the plan is printed before the refusal: it shows the numbers behind it
        drawing.draw(made, console)
    if found:
        raise UserError("this recipe cannot work there:\n" + "\n".join(f"  - {problem}" for problem in found))


def _is_here(asked: Asked) -> bool:
    """Return whether the plan is for this machine, by the options."""
    return asked.gpus is None and asked.nodes == 1 and asked.gpu is None and asked.gpu_memory is None


def _untracked(settings: "LoggerSettings", asked: Asked) -> list[str]:
    """Return why `decoct run` would refuse the recipe's loggers here; [] if it would not. For another machine that is only told."""
    from ...trainer.trackers.build import check_trackers

    try:
        check_trackers(settings)
    except UserError as error:
        if _is_here(asked):
            return [str(error)]
        print(f"decoct: on this machine, {error}", file=sys.stderr)
    return []


def _measured(asked: Asked, name: str) -> dict[str, float]:
    """Return the speeds of the run folder, if they hold for the machine of the plan; say if a folder that was named has none."""
    from ..plan.measured_speed import measured_speeds

    # a run folder tells of the machine that it ran on; for another one it says nothing
    used = _is_here(asked) and asked.tokens_per_second is None
    found = measured_speeds(asked.out or Path("runs") / name) if used else {}
    if asked.out is not None and not found:
        if not asked.out.is_dir():
            why = "there is no such run folder"
        elif not used:
            why = "is not read: the options give another machine or speed than the one that it was measured on"
        else:
            why = "has no steps whose speed was measured"
        print(f"decoct: --out {asked.out}: {why}; the times are not those of a run", file=sys.stderr)
    return found


def _speed(asked: Asked, name: str) -> "Speed":
    """Return what options and the run folder say of speed and price.

    Raises: UserError for a value that is no share, speed or price.
    """
    from ..plan.duration import EFFICIENCY, Speed
    from ..plan.gpus import find_gpu

    if asked.efficiency is not None and not 0 < asked.efficiency <= 1:
        raise UserError(f"--efficiency={asked.efficiency:g} must be above 0 and at most 1; it is a share of the GPU's peak, such as 0.4")
    if asked.price is not None and not 0 <= asked.price < math.inf:
        raise UserError(f"--price={asked.price:g} must be a number of at least 0, the price of one GPU for an hour")
    link = None if asked.link is None else _bytes_per_second(asked.link)
    return Speed(
        gpu=None if asked.gpu is None else find_gpu(asked.gpu),
        efficiency=EFFICIENCY if asked.efficiency is None else asked.efficiency,
        link=link,
        tokens_per_second=None if asked.tokens_per_second is None else _rate(asked.tokens_per_second),
        measured=_measured(asked, name),
        price=asked.price,
    )


def _bytes_per_second(text: str) -> float:
    try:
        # amounts as for --gpu-memory, with or without '/s'
        return float(parse_bytes(text.removesuffix("/s"), "--link"))
    except UserError as error:
        raise UserError(f"--link={text} is not what a GPU sends in a second; write it with its unit, such as 50GB") from error


def _rate(text: str) -> float:
    from ...configs.scalars import parse_number

    number = parse_number(text)
    if number is None or number[1] or number[0] <= 0:
        raise UserError(f"--tokens-per-second={text} must be a number above 0, such as 12000 or 12k")
    return float(number[0])
