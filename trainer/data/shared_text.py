"""Text that several processes encode: each some units of it, and in the end one stream with one index.

    <fingerprint>.units/plan.json     the units (``units.py``)
    <fingerprint>.units/00017/        stream, bounds, hashes and progress.json as in ``unfinished.py``; found.json: what was left out
    <fingerprint>.units/00017.lock    held by the process that encodes the unit
    <fingerprint>.units/00017.failed  why it cannot be encoded

A unit gets its name by one rename, so it is complete or absent, and a process that is killed loses the unit that it was encoding. The
stream is that of a single process, byte for byte: documents are encoded one by one, and the units hold them in order.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...models.common.errors import UserError
from ...models.common.files import atomic_directory, clean_leftovers, write_text_atomic
from ...models.common.locks import Lock
from ..processes.world import World
from ..settings import DataSettings
from .pieces import Unit, plain_units, units_from
from .token_arrays import JoinedTokens
from .tokens import TokenStream, mapped_tokens, tokenizer_hash
from .unfinished import forget_old
from .unit_files import Findings, encode_unit, is_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
"""Version of the units; raise it whenever a unit would hold other tokens."""
SEEN_SECONDS = 60.0
"""How long another machine's file may take to appear on a shared file system."""
_POLL_SECONDS = 0.2
_REPORT_SECONDS = 10.0
_PLAN = "plan.json"
Say = Callable[[str], None]


class SharedText:
    """The units of one text in the cache.

    Args:
        folder: Their folder.
        units: The units, in order.
        settings: How they are read and encoded.
        tokenizer: The tokenizer.
    """

    def __init__(self, folder: Path, units: list[Unit], settings: DataSettings, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.folder, self.units = folder, units
        self._settings, self._tokenizer = settings, tokenizer

    @classmethod
    def begin(cls, folder: Path, units: list[Unit], settings: DataSettings, tokenizer: "PreTrainedTokenizerBase") -> "SharedText":
        """Writes the plan of the units for all processes; finished ones of an earlier start are kept."""
        plan = {"format": FORMAT, "tokenizer": tokenizer_hash(tokenizer), "units": plain_units(units)}
        if folder.exists() and _without_names(_read_plan(folder)) != _without_names(plan):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        forget_old(folder)
        clean_leftovers(folder)
        for failure in folder.glob("*.failed"):
            failure.unlink(missing_ok=True)
        for number in range(len(units)):
            if (unit := folder / f"{number:05d}").exists() and not is_whole(unit):
                shutil.rmtree(unit)
        # names of files may have bytes that are not UTF-8, which ASCII escapes keep
        write_text_atomic(folder / _PLAN, json.dumps(plan))
        return cls(folder, units, settings, tokenizer)

    @classmethod
    def join(cls, folder: Path, settings: DataSettings, tokenizer: "PreTrainedTokenizerBase") -> "SharedText":
        """The units that another process has planned.

        Raises:
            UserError: this machine does not see them, or its tokenizer is another.
        """
        until = time.monotonic() + SEEN_SECONDS
        while not (folder / _PLAN).exists():
            if time.monotonic() > until:
                raise UserError(
                    f"{folder}, where rank 0 has begun to tokenize, is not on this machine; all ranks need the same DECOCT_CACHE folder"
                )
            time.sleep(_POLL_SECONDS)
        plan = _read_plan(folder)
        if plan.get("tokenizer") != tokenizer_hash(tokenizer):
            raise UserError("this machine loads another tokenizer than rank 0; all machines need the same versions and the same files")
        return cls(folder, units_from(plan["units"]), settings, tokenizer)

    def missing(self) -> list[int]:
        """Numbers of the units that are not encoded."""
        return [number for number in range(len(self.units)) if not self._place(number).exists()]

    def encode_share(self, world: World, say: Say) -> None:
        """Encodes units that no other process encodes: first its own share of them, then what the others have not begun.

        A unit that cannot be encoded is noted for all processes, and ends the work of each. A unit whose files this machine does not have
        is left to rank 0, which has found them.
        """
        rank, size = world.rank, world.size
        _share_cores(world)
        missing = self.missing()
        own = [number for number in missing if number % size == rank]
        # from the end: where there are no locks, a process meets the owner of these units once, and not at each of them
        others = [number for number in reversed(missing) if number % size != rank]
        absent, reported = 0, time.monotonic()
        for number in own + others:
            if self._failures():
                return
            if self._place(number).exists():
                continue
            if rank and not all(piece.is_here() for piece in self.units[number]):
                absent += 1
                continue
            with Lock(self.folder / f"{number:05d}.lock") as lock:
                if lock.acquire() and not self._place(number).exists():
                    self._encode(number)
            if rank == 0 and time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                say(f"tokenized {len(self.units) - len(self.missing()):,} of {len(self.units):,} parts of the text")
        if absent:
            say(f"rank {rank} leaves {absent:,} of {len(self.units):,} parts of the text to rank 0, because it does not have their files")

    def encode_all(self, world: World, say: Say) -> None:
        """``encode_share`` of rank 0, until all units are there.

        Raises:
            UserError: a unit cannot be encoded.
        """
        while self.missing():
            self.encode_share(world, say)
            if failures := self._failures():
                raise UserError(failures[0])
            # other processes are at work on what is missing now; what one of them leaves is taken in the next round
            time.sleep(_POLL_SECONDS)

    def stream(self) -> tuple[TokenStream, Findings]:
        """The tokens of all units, which are all encoded, as of one text."""
        tokens: list[np.ndarray] = []
        bounds, hashes = [np.zeros(1, dtype=np.int64)], [np.empty(0, dtype=np.uint64)]
        found, begin = Findings(), 0
        for number in range(len(self.units)):
            folder = self._place(number)
            tokens.append(mapped_tokens(folder / "stream"))
            ends = np.fromfile(folder / "bounds", dtype=np.int64)
            # a unit of blank documents has none
            last = int(ends[-1]) if len(ends) else 0
            bounds.append(ends + begin)
            begin += last
            hashes.append(np.fromfile(folder / "hashes", dtype=np.uint64))
            found.add(folder)
        return TokenStream(JoinedTokens(tokens), np.concatenate(bounds), np.concatenate(hashes)), found

    def _place(self, number: int) -> Path:
        return self.folder / f"{number:05d}"

    def _failures(self) -> list[str]:
        """Why units cannot be encoded, in their order."""
        return [failure.read_text(encoding="utf-8") for failure in sorted(self.folder.glob("*.failed"))]

    def _encode(self, number: int) -> None:
        place = self._place(number)
        try:
            # a folder of this name may be there by now: on a file system without locks two processes may do the same unit
            with atomic_directory(place) as folder:
                encode_unit(self.units[number], self._settings, self._tokenizer, folder)
        except UserError as error:
            if not place.exists():
                write_text_atomic(place.with_name(f"{place.name}.failed"), str(error))


def _share_cores(world: World) -> None:
    """Gives the tokenizer's threads of each process on this machine their part of its cores; a number that the user has set is kept."""
    # read by the library when it starts its threads, with the first text
    if world.local_size > 1:
        os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world.local_size)))


def _read_plan(folder: Path) -> dict[str, Any]:
    """The plan of the units; {} if it cannot be read."""
    try:
        plan = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return plan if isinstance(plan, dict) else {}


def _without_names(plan: dict[str, Any]) -> Any:
    """What decides the tokens of each unit. The text is known by its hash, so its files may have moved."""
    try:
        return [plan["format"], plan["tokenizer"], [[piece[1:] for piece in unit] for unit in plan["units"]]]
    except (KeyError, TypeError):
        return None
