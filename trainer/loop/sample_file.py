"""Rows of samples, and the files that keep them: ``<stage>/samples/step-<first step>.json``, sealed with a hash.

A file has the rows of all ranks for the steps from one refresh to the next, so that a stage that was killed between the two goes on with
the same samples, on any number of ranks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...models.common.files import write_json_atomic
from ...models.common.seal import SEAL, seal_is_broken, sealed
from ..data.windows import DTYPE, STARTS_DTYPE, Windows


@dataclass(frozen=True)
class Sample:
    """A completion."""

    prompt: list[int]
    own: list[int]
    """Ids that the model drew; the last one is its end token, unless it was cut."""
    cut: bool
    """Whether it reached the limit before the model ended it."""


@dataclass(frozen=True)
class SampleRow:
    """The samples that stand in one window's place."""

    position: int
    """Place in the stream of windows (``data.order``)."""
    window: int
    """Window of the prompts."""
    writer: str
    """student or teacher."""
    fresh: bool
    """Drawn for this refresh; False for samples of the teacher that an earlier epoch has drawn."""
    samples: tuple[Sample, ...]

    def as_window(self, seq_length: int, *, packed: bool) -> dict[str, Tensor]:
        """The row as a training window: labels on the completions alone, positions that start anew with each sample if ``packed``."""
        # as windows are stored: -1 - id is a token that is not predicted
        parts = [np.array([*(-1 - token for token in one.prompt), *one.own], dtype=DTYPE) for one in self.samples]
        stored = np.concatenate(parts)
        sizes = np.array([len(part) for part in parts])
        rows = np.zeros((1, seq_length), dtype=DTYPE)
        rows[0, : len(stored)] = stored
        starts = (np.cumsum(sizes) - sizes).astype(STARTS_DTYPE) if packed else None
        return Windows(rows, np.array([len(stored)], dtype=DTYPE), starts)[0]

    def plain(self) -> list[Any]:
        """The row as JSON types; ``row_from`` turns it into an equal one."""
        samples = [[one.prompt, one.own, one.cut] for one in self.samples]
        return [self.position, self.window, self.writer, self.fresh, samples]


def row_from(plain: Sequence[Any]) -> SampleRow:
    """The row of ``SampleRow.plain``."""
    position, window, writer, fresh, samples = plain
    return SampleRow(position, window, writer, fresh, tuple(Sample(*one) for one in samples))


def file_of(folder: Path, step: int) -> Path:
    """The file of the samples that were drawn before ``step`` + 1."""
    return folder / f"step-{step:08d}.json"


def stored_steps(folder: Path) -> list[int]:
    """Steps of all files, ascending."""
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.json"))


def write_samples(folder: Path, step: int, content: Mapping[str, Any]) -> None:
    """Writes a file with one rename."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(file_of(folder, step), sealed(content))


def read_samples(folder: Path, step: int, key: str) -> dict[str, Any] | None:
    """The content of a file; None if there is none, it is damaged, or belongs to another ``key``."""
    try:
        content = json.loads(file_of(folder, step).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(content, dict) and SEAL in content and not seal_is_broken(content)
    return content if whole and content.get("key") == key and content.get("step") == step else None
