"""Some optimizer steps of a tiny stage on this rank, with everything that is handed to collectives counted; prints it as JSON.

``python traffic_case.py WORK KIND [key=value ...]`` with the options of ``training_case.py`` beside it, and ``teacher=sharded``.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training_case import VOCAB, Case, leave_together, run_case, tiny_model

from decoct.losses.settings import LossSettings
from decoct.models.teachers.local import LocalTeacher
from decoct.models.teachers.sharded import sharded_model
from decoct.trainer.loop.objective import Objective
from decoct.trainer.processes.world import connect, current_world

counted = {"all_reduce": 0, "all_gather": 0, "reduce_scatter": 0}


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def watch() -> None:
    """Count what DDP and FSDP2 hand over, where each of them hands it over."""

    def counting(name: str, kind: str, place: int, argument: str) -> None:
        plain = getattr(dist, name, None)
        if plain is None:
            return

        def call(*arguments: Any, **named: Any) -> Any:
            counted[kind] += _bytes(named[argument] if argument in named else arguments[place])
            return plain(*arguments, **named)

        setattr(dist, name, call)

    # releases of torch differ in the name; each calls only one of them
    for name in ("all_gather_into_tensor", "all_gather_single"):
        counting(name, "all_gather", 0, "output_tensor")
    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
        counting(name, "reduce_scatter", 1, "input")
    reduce = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        # between machines; sums of losses and norms, and Lightning's own, are over all processes
        if (group := named.get("group")) is not None and dist.get_world_size(group) < dist.get_world_size():
            counted["all_reduce"] += _bytes(tensor)
        return reduce(tensor, *arguments, **named)

    dist.all_reduce = all_reduce
    built = DistributedDataParallel.__init__

    def init(self: Any, *arguments: Any, **named: Any) -> None:
        built(self, *arguments, **named)

        def hook(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # pyright: ignore[reportPrivateImportUsage] - DDP asks for it
            counted["all_reduce"] += _bytes(bucket.buffer())
            bucket.buffer().div_(dist.get_world_size())
            work = dist.all_reduce(bucket.buffer(), async_op=True)
            assert work is not None
            return work.get_future().then(lambda future: future.value()[0])

        self.register_comm_hook(None, hook)

    DistributedDataParallel.__init__ = init


def sharded_objective(work: Path) -> Objective:
    """Forward KL to a teacher of which each rank holds a share."""
    connect(current_world())
    folder = work / "teacher"
    if current_world().is_first:
        tiny_model(2, dropout=0.0, tied=False).save_pretrained(folder)
    dist.barrier()
    teacher = LocalTeacher(sharded_model(folder, dtype=torch.float32, device="cpu"), v_eff=VOCAB)
    return Objective(teacher, LossSettings(), v_eff=VOCAB)


def main() -> None:
    torch.set_num_threads(1)
    work, kind, *options = sys.argv[1:]
    given = dict(option.split("=") for option in options)
    changes: dict[str, Any] = {}
    if given.pop("teacher", None):
        changes["objective"] = sharded_objective(Path(work))
    case = Case(kind=kind)
    for key, value in given.items():
        case = replace(case, **{key: type(getattr(case, key))(value)})
    watch()
    Path(work).mkdir(parents=True, exist_ok=True)
    run_case(case, Path(work), **changes)
    print(json.dumps(counted))
    leave_together()


if __name__ == "__main__":
    main()
