"""Coordinates the processes of a run.

Training stages run on all ranks. Everything else runs on rank 0, while the other ranks poll a status file in the run folder. No collective
is pending in the meantime, so nothing can time out. If rank 0 fails, the status file says so, and every rank ends with the same exit code.
"""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...models.common.errors import DecoctError
from ...models.common.files import write_json_atomic
from ...parts import PartError
from ...trainer.processes.world import World, connect, value_of_first
from ..terminal.boundary import own_place
from .processes import remember_outcome

POLL_SECONDS = 0.2
_STALE_SECONDS = 60.0
_PARTING_SECONDS = 10.0


class RankZeroFailed(SystemExit):
    """Raised on the other ranks when rank 0 failed; carries its exit code and prints nothing."""


class Session:
    """Runs a function on rank 0 and passes its JSON result to every rank, through status files of this start of the run."""

    def __init__(self, world: World, run_dir: Path) -> None:
        self.world = world
        self.removes = False
        """Whether a failure of rank 0 removes the run folder, which holds the status files: then no rank leaves before it is gone."""
        self._count = 0
        self._folder = run_dir / ".session" / self._agree_on_id()

    def _agree_on_id(self) -> str:
        """Return a name for this start, the same on all ranks, so that no rank reads status files of an earlier start."""
        if self.world.size == 1:
            return "single"
        # the id must be agreed on before the first file is written, and only a collective can do that
        connect(self.world)
        return f"{value_of_first(time.time_ns()):x}"

    def on_first(self, work: Callable[[], Any], assist: Callable[[Any], None] | None = None) -> Any:
        """Run ``work`` on rank 0 while the others wait; its JSON-able value is returned everywhere.

        Args:
            work: The work. It may call ``ask`` once.
            assist: Called on the other ranks with what rank 0 asks for, before they wait on.

        Raises: on rank 0 whatever ``work`` raises, on the others ``RankZeroFailed`` with the same exit code.
        """
        # every rank counts its calls, and all ranks make the same calls in the same order: the number names the status file
        self._count += 1
        if self.world.size == 1:
            return work()
        status = self._status()
        return self._work_and_tell(work, status) if self.world.is_first else self._wait_for(status, assist)

    def ask(self, wanted: Any) -> None:
        """Ask the other ranks for help with the current work of rank 0, which calls this; ``wanted`` is JSON-able."""
        write_json_atomic(self._asked(self._status()), wanted)

    def _status(self) -> Path:
        """The status file of the current call."""
        return self._folder / f"{self._count:04d}.json"

    @staticmethod
    def _asked(status: Path) -> Path:
        return status.with_suffix(".ask.json")

    def _work_and_tell(self, work: Callable[[], Any], status: Path) -> Any:
        status.parent.mkdir(parents=True, exist_ok=True)
        try:
            value = work()
        except BaseException as error:
            # also for KeyboardInterrupt and SystemExit: the others would poll for ever
            own = isinstance(error, PartError) or own_place(error) is not None
            code = error.exit_code if isinstance(error, DecoctError) else 2 if own else 1
            write_json_atomic(status, {"state": "failed", "code": code, "removes": self.removes})
            raise
        write_json_atomic(status, {"state": "done", "value": value})
        return value

    def _wait_for(self, status: Path, assist: Callable[[Any], None] | None) -> Any:
        asked = self._asked(status)
        # the file appears by one rename, so what exists is whole. A killed rank 0 never writes it: then the agent ends these ranks
        while not status.exists():
            if assist is not None and asked.exists():
                assist(json.loads(asked.read_text()))
                assist = None
            time.sleep(POLL_SECONDS)
        told = json.loads(status.read_text())
        if told["state"] == "failed":
            if told.get("removes"):
                self._wait_for_removal(status)
            raise RankZeroFailed(told["code"])
        return told["value"]

    def _wait_for_removal(self, status: Path) -> None:
        """Tell rank 0 that this rank knows, and stay: an agent ends all ranks, rank 0 too, when the first one leaves."""
        with suppress(OSError):
            self._farewell(status, self.world.rank).touch()
        until = time.monotonic() + _PARTING_SECONDS
        while status.exists() and time.monotonic() < until:
            time.sleep(POLL_SECONDS)

    def wait_for_farewells(self) -> None:
        """Wait until every other rank knows that rank 0 has failed, which calls this before it removes the status files."""
        if self.world.size == 1 or not self._count:
            return
        until = time.monotonic() + _PARTING_SECONDS
        others = [self._farewell(self._status(), rank) for rank in range(1, self.world.size)]
        while not all(file.exists() for file in others) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)

    @staticmethod
    def _farewell(status: Path, rank: int) -> Path:
        return status.with_suffix(f".{rank}.knows")

    def close(self, code: int = 0) -> None:
        """Remove the status files (rank 0) once every rank has read them, and leave the exit ``code`` for the agent.

        After this call the run is complete, even if the process crashes: gloo's threads may abort a process whose peers have just left.
        The process group stays open for the same reason; ``processes.leave`` ends the process without closing it.
        """
        if self.world.size == 1:
            return
        import torch.distributed as dist

        dist.barrier()
        remember_outcome(code)
        if self.world.is_first:
            self._clean()
        dist.barrier()

    def _clean(self) -> None:
        """Remove the status files of this start and of earlier ones, except a start that was just refused and may still read its own."""
        for folder in self._folder.parent.iterdir():
            with suppress(OSError):
                old = time.time() - folder.stat().st_mtime > _STALE_SECONDS
                if folder == self._folder or old or folder.name < self._folder.name:
                    shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            self._folder.parent.rmdir()
