"""Counts the zeros of a pruned model in the files that were written, and compares them with what was claimed."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from ..common.errors import DecoctError
from .pattern import Pattern
from .selection import follows


def check_stored(folder: Path, linears: Mapping[str, nn.Linear], kept: int, pattern: Pattern | None = None) -> float:
    """Measures the sparsity of the linears in the safetensors files of ``folder``.

    Args:
        folder: The files, under the names of the model.
        linears: The pruned linears in memory.
        kept: Most weights that may be other than zero, over all linears; a tied weight counts once.
        pattern: Pattern that every linear must follow.

    Returns:
        Share of exact zeros.

    Raises:
        DecoctError: a file has other zeros than memory, more weights than ``kept``, or a group with more than the pattern allows. Nobody
            but decoct can cause it.
    """
    total = zeros = 0
    seen: set[str] = set()
    for name, stored in _stored(folder, [f"{name}.weight" for name in linears]):
        seen.add(name)
        own = linears[name.removesuffix(".weight")].weight.detach()
        # in the stored dtype: a tiny number may become zero when it is written
        if stored.shape != own.shape or not bool(((own.to(stored.dtype) == 0).to(stored.device) == (stored == 0)).all()):
            raise DecoctError(f"{name} was written with other zeros than it has; this is a fault of decoct, please report it")
        if pattern is not None and not follows(stored, pattern):
            raise DecoctError(f"{name} was written with groups that do not follow {pattern}; this is a fault of decoct, please report it")
        total += stored.numel()
        zeros += int((stored == 0).sum())
    missing = {id(linear.weight): name for name, linear in linears.items() if f"{name}.weight" not in seen}
    written = {id(linears[name.removesuffix(".weight")].weight) for name in seen}
    # a tied weight is written under one of its names
    if left_out := [name for weight, name in missing.items() if weight not in written]:
        raise DecoctError(f"{left_out[0]} was not written; this is a fault of decoct, please report it")
    if total - zeros > kept:
        raise DecoctError(
            f"{total - zeros:,} weights were written where {kept:,} of {total:,} stay; this is a fault of decoct, please report it"
        )
    return zeros / total if total else 0.0


def _stored(folder: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of those of ``names`` that the files of the folder hold, one at a time."""
    from safetensors import safe_open

    wanted = set(names)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(wanted.intersection(opened.keys())):
                yield name, opened.get_tensor(name)
