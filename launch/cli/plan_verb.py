"""The verb `plan`."""

import json
import re
from collections.abc import Sequence

from ...models.common.errors import UserError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str, option: str) -> int:
    """Parse '80GB', '24 GiB' or '85899345920' into bytes; UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"{option}={text!r} is not an amount of memory; write it as 80GB or 24GiB")
    amount = int(float(match[1]) * _UNITS[match[2].lower()])
    # a bare 80 is 80 bytes to a computer and gigabytes to everybody else
    if not match[2] and amount < 10**6:
        raise UserError(f"{option}={text} is {amount:,} bytes; write the unit too: {text.strip()}GB")
    return amount


def run_plan(
    recipe: str,
    overrides: Sequence[str],
    gpus: int | None,
    nodes: int,
    gpu_memory: str | None,
    tensor_parallel: int,
    as_json: bool,
) -> None:
    """Print the plan; then raise UserError (exit code 2) if something cannot work."""
    from ...configs.loader import load_recipe
    from ..plan import show as drawing
    from ..plan.make_plan import plan
    from ..plan.problems import problems
    from ..report.tables import WIDE
    from ..terminal.console import CleanConsole
    from ..terminal.imported_code import tell_imported

    for option, value in (("--gpus", gpus), ("--nodes", nodes), ("--tensor-parallel", tensor_parallel)):
        if value is not None and value < 1:
            raise UserError(f"{option}={value} must be at least 1")
    memory = None if gpu_memory is None else parse_bytes(gpu_memory, "--gpu-memory")
    loaded = load_recipe(recipe, overrides, tell=tell_imported)
    made = plan(loaded, gpus=gpus, gpu_memory=memory, nodes=nodes, tensor_parallel=tensor_parallel)
    if as_json:
        print(json.dumps(drawing.as_json(made), indent=1))
    else:
        console = CleanConsole()
        if not console.is_terminal:
            console.width = max(console.width, WIDE)
        # the plan is printed before the refusal: it shows the numbers behind it
        drawing.draw(made, console)
    if found := problems(made):
        raise UserError("this recipe cannot work there:\n" + "\n".join(f"  - {problem}" for problem in found))
