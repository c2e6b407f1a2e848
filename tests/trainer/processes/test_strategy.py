"""What each strategy shares among processes, and when weights travel as bf16."""

import itertools

import pytest

from decoct.models.common.errors import UserError
from decoct.trainer.processes.strategy import choose_strategy, copies, gathers_bf16, shards
from decoct.trainer.processes.world import World


def test_machines_hold_a_sharded_student_together_or_each_of_them() -> None:
    world = World(rank=5, local_rank=1, size=8, local_size=2)
    assert [copies(chosen, world) for chosen in ("ddp", "fsdp2", "hsdp")] == [1, 1, 4]
    assert [shards(chosen, world) for chosen in ("ddp", "fsdp2", "hsdp")] == [False, True, True]
    assert not shards("hsdp", World())
    assert copies("hsdp", World(rank=3, local_rank=3, size=4, local_size=4)) == 1, "one machine"


@pytest.mark.parametrize(
    "world",
    [
        World(rank=0, local_rank=0, size=5, local_size=3),
        # four machines of one, two, two and one: this one has two
        World(rank=1, local_rank=0, size=6, local_size=2),
    ],
)
def test_machines_of_different_sizes_are_refused(world: World) -> None:
    with pytest.raises(UserError, match=r"hsdp needs the same number of processes on every machine; .* Use fsdp2"):
        copies("hsdp", world)


def test_the_strategy_that_is_asked_for_is_taken() -> None:
    given = {"ranks": 4, "parameters": 10, "optimizer": "adamw", "teacher_bytes": 0, "device_bytes": 10**9}
    assert choose_strategy("hsdp", **given) == "hsdp"  # pyright: ignore[reportArgumentType] - a dict's values are plain
    assert choose_strategy("auto", **given) == "ddp"  # pyright: ignore[reportArgumentType]


def test_only_what_autocast_would_round_travels_as_bf16() -> None:
    for precision, rounded, compiled, family in itertools.product(("bf16-mixed", "32"), (False, True), (False, True), ("qwen3", "gemma2")):
        wanted = (precision, rounded, compiled, family) == ("bf16-mixed", False, False, "qwen3")
        assert gathers_bf16(precision, rounded=rounded, compiled=compiled, family=family) is wanted  # pyright: ignore[reportArgumentType]
