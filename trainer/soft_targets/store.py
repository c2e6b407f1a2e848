"""A teacher's cache on disk: a header and shards; a shard is complete or does not count.

    header.json               teacher, tokenizer, vocabulary, temperature, mode, format; a reader must have the same
    shards/NAME.rows          rows of one size, sequence after sequence, memory-mapped
    shards/NAME.keys          for each sequence its key (16 bytes) and its number of rows (int64)
    shards/NAME.json          sizes and sha256 of both, and figures; written last

Several processes may write at the same time, each its own shards with unique names. A sequence that was written twice is read once.
"""

import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models.common.errors import UserError
from ...models.common.files import check_free_space, check_writable_folder, sha256_file, storage_error, write_json_atomic
from ...models.common.hash_cache import cached_sha256
from ...models.common.seal import seal_is_broken, sealed
from .keys import KEY_BYTES

FORMAT = 2
"""Version of the format; raise it whenever the meaning of bytes changes."""
HEADER = "header.json"
# little-endian and without padding: 24 bytes on every machine
_ENTRY = np.dtype([("key", f"V{KEY_BYTES}"), ("rows", "<i8")])


def open_store(folder: Path, header: dict[str, Any]) -> "Store":
    """Opens the cache with this header, or creates it.

    Raises:
        UserError: the folder has another header (the message names each difference), or cannot be read or written.
    """
    header = {"format": FORMAT, **header}
    file = folder / HEADER
    # two processes may both write it: the same header, each by a rename
    if not file.exists():
        check_writable_folder(folder / "shards", "the teacher's cache (teacher.cache.path, or the environment variable DECOCT_CACHE)")
        write_json_atomic(file, header)
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); delete the folder to have it made again") from None
    # compared as JSON gives it back: tuples in the header have become lists in the file
    if not isinstance(found, dict) or found != json.loads(json.dumps(header)):
        there: dict[str, Any] = found if isinstance(found, dict) else {}
        names = sorted(name for name in there.keys() | header.keys() if there.get(name) != header.get(name))
        differences = "; ".join(f"{name} is {there.get(name)!r} there and {header.get(name)!r} here" for name in names)
        raise UserError(f"the teacher's cache {folder} does not fit this recipe: {differences}. Name another folder in teacher.cache.path.")
    return Store(folder, int(header["bytes_per_token"]))


@dataclass(frozen=True)
class Shard:
    """A finished shard."""

    name: str
    keys: np.ndarray
    counts: np.ndarray
    rows: np.ndarray
    figures: dict[str, float]


class Store:
    """Reads and adds sequences.

    Args:
        folder: Folder with a header.
        width: Bytes per row.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, width
        self.shards: dict[str, Shard] = {}
        self._index = (np.empty(0, "<u8"), np.empty(0, "<u8"), np.empty((0, 3), "<i8"))

    def refresh(self, *, thorough: bool = False) -> list[str]:
        """Finds shards that were added since the last call.

        Args:
            thorough: Also compare hashes, and remove damaged shards.

        Returns:
            One line per damaged shard.
        """
        problems: list[str] = []
        for manifest in sorted((self.folder / "shards").glob("*.json")):
            # shards never change, so one that is open needs no second look
            if manifest.stem in self.shards and not thorough:
                continue
            if fault := _fault(manifest, thorough=thorough):
                problems.append(f"{manifest.stem}: {fault}")
                if thorough:
                    # the manifest first: without it the shard is gone for every reader, whatever a kill leaves of the rest
                    for ending in (".json", ".rows", ".keys"):
                        manifest.with_suffix(ending).unlink(missing_ok=True)
                self.shards.pop(manifest.stem, None)
            else:
                self.shards[manifest.stem] = self._open(manifest)
        self._build_index()
        return problems

    def bytes_on_disk(self) -> int:
        """Size of the open shards, keys and manifests included."""
        manifests = [self.folder / "shards" / f"{name}.json" for name in self.shards]
        return sum(manifest.with_suffix(ending).stat().st_size for manifest in manifests for ending in (".json", ".rows", ".keys"))

    def _open(self, manifest: Path) -> Shard:
        entries = np.fromfile(manifest.with_suffix(".keys"), dtype=_ENTRY)
        rows = manifest.with_suffix(".rows")
        # [rows, width], mapped: a cache may be larger than memory
        data = np.memmap(rows, np.uint8, "r").reshape(-1, self.width) if rows.stat().st_size else np.empty((0, self.width), np.uint8)
        return Shard(manifest.stem, entries["key"], entries["rows"], data, json.loads(manifest.read_text())["figures"])

    def _build_index(self) -> None:
        """Sorts all keys by their first 8 bytes, so that ``find`` is a binary search over plain integers."""
        keys: list[np.ndarray] = [np.empty(0, f"V{KEY_BYTES}")]
        places: list[np.ndarray] = [np.empty((0, 3), "<i8")]
        for number, shard in enumerate(self.shards.values()):
            ends = np.cumsum(shard.counts)
            keys.append(shard.keys)
            places.append(np.stack([np.full(len(ends), number), ends - shard.counts, ends], 1))
        # keys are hashes: different ones with the same first half do not occur in practice
        halves = np.frombuffer(np.concatenate(keys).tobytes(), "<u8").reshape(-1, 2)
        order = np.argsort(halves[:, 0], kind="stable")
        self._index = (halves[order, 0], halves[order, 1], np.concatenate(places)[order])
        self._rows = [shard.rows for shard in self.shards.values()]

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """[n, 3] int64: shard, first row and end per sequence; -1 for sequences that are not in the cache."""
        first, second, places = self._index
        halves = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        at = np.searchsorted(first, halves[:, 0])
        found = np.full((len(keys), 3), -1, np.int64)
        if len(first):
            # a key beyond the last one would point outside; it is compared with the last and does not match
            near = np.minimum(at, len(first) - 1)
            hit = (first[near] == halves[:, 0]) & (second[near] == halves[:, 1])
            found[hit] = places[near[hit]]
        return found

    def read(self, keys: Sequence[bytes]) -> Tensor:
        """The rows of sequences, concatenated: [n, width] uint8 in host memory.

        Raises:
            UserError: a sequence is not in the cache.
        """
        places = self.find(keys)
        if (missing := int((places[:, 0] < 0).sum())) > 0:
            raise UserError(f"the teacher's cache {self.folder} lacks {missing} of {len(keys)} windows; run decoct cache RECIPE to fill it")
        # copied out of the maps, one batch at a time
        parts = [self._rows[shard][begin:end] for shard, begin, end in places.tolist()]
        return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, self.width, dtype=torch.uint8)

    def add(self, keys: Sequence[bytes], rows: Sequence[Tensor], figures: dict[str, float]) -> None:
        """Writes one shard.

        Raises:
            UserError: it cannot be written; nothing of it is left.
        """
        # a name of its own, so that processes need no lock to write
        target = self.folder / "shards" / f"{uuid.uuid4().hex}.json"
        entries = np.empty(len(keys), _ENTRY)
        entries["key"] = np.frombuffer(b"".join(keys), f"V{KEY_BYTES}")
        entries["rows"] = [len(part) for part in rows]
        data = torch.cat(list(rows)).cpu().numpy()
        files = {".rows": data, ".keys": entries}
        try:
            check_free_space(target.parent, data.nbytes, "the teacher's cache (teacher.cache.path, or DECOCT_CACHE)")
            for ending, array in files.items():
                with target.with_suffix(ending).open("wb") as file:
                    file.write(array.tobytes())
                    file.flush()
                    os.fsync(file.fileno())
            # last: without its manifest a shard does not exist for readers
            facts = {end[1:]: {"bytes": a.nbytes, "sha256": sha256_file(target.with_suffix(end))} for end, a in files.items()}
            write_json_atomic(target, sealed({"files": facts, "figures": figures}))
        # also the UserError that a full disk becomes while the manifest is written
        except BaseException as error:
            for ending in files:
                target.with_suffix(ending).unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise storage_error(error, target, "write the teacher's cache") or error from error
            raise


def _fault(manifest: Path, *, thorough: bool) -> str:
    """The fault of a shard; '' if it has none."""
    try:
        content = json.loads(manifest.read_text())
        if seal_is_broken(content):
            return f"{manifest.name} is not what was written"
        if not isinstance(content["figures"], dict):
            return f"{manifest.name} has no figures"
        for ending, facts in content["files"].items():
            path = manifest.with_suffix(f".{ending}")
            if path.stat().st_size != facts["bytes"]:
                return f"{path.name} has another size"
            if thorough and cached_sha256(path) != facts["sha256"]:
                return f"{path.name} has another hash"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{manifest.name} cannot be read: {type(error).__name__}"
    return ""
