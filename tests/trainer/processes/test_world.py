"""Ranks meet in a part of the store that no earlier start of theirs has used."""

import threading
from datetime import timedelta
from pathlib import Path

import pytest
from torch._C._distributed_c10d import FileStore

from decoct.trainer.processes import world


def _meet(file: Path, size: int) -> list[str]:
    """What each rank reads of a value that rank 0 sets in its fresh store, after all have met."""
    seen = [""] * size

    def rank(number: int) -> None:
        own = FileStore(str(file), size)
        own.set_timeout(timedelta(seconds=10))
        fresh = world._fresh_store(own, number, size)
        assert not fresh.check(["left"]), "what an earlier start has left is not seen"
        if number == 0:
            fresh.set("address", file.name)
        fresh.wait(["address"], timedelta(seconds=10))
        seen[number] = fresh.get("address").decode()
        fresh.set("left", "1")

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return seen


def test_ranks_that_start_again_do_not_see_what_the_dead_have_left(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for _ in range(3):
        assert _meet(store, 3) == ["store"] * 3


def test_a_rank_that_never_comes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "MEETING_TIMEOUT", timedelta(seconds=0.3))
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not come"):
        world._fresh_store(FileStore(str(tmp_path / "store"), 3), 0, 3)
