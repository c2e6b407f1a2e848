"""Sums of a batch by what its rows are (text of the student's own, texts of a blend) and by the terms of the loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ...losses.shift import MASKED
from ...losses.sums import LossSums
from ..data.joined_windows import PART

OWN = "own"
"""Key of a batch with samples, int64 [B]: 1 for rows that the student wrote itself."""
PART_SUMS = ("tokens", "loss", "kl", "cross_entropy")
"""Columns of ``SplitSums.parts``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitSums(LossSums):
    """Sums of a batch, and how much of them belongs to which rows and terms."""

    own_tokens: Tensor | None = None
    """Unmasked tokens of rows that the student wrote, int64; None without samples."""
    own_kl: Tensor | None = None
    """Their KL(teacher || student) at temperature 1."""
    parts: Tensor | None = None
    """``PART_SUMS`` of each text of a blend, fp64 [texts, 4], their loss that on predictions; None without a blend."""
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of a term of the loss -> its sum over the unmasked tokens, without its weight; empty if the loss is on predictions alone."""


def split_sums(sums_of: Callable[[Tensor], LossSums], labels: Tensor, batch: Mapping[str, Tensor]) -> LossSums:
    """Sums of a batch: ``SplitSums`` where its rows are told apart.

    Args:
        sums_of: Computes the sums of the labels that are not masked.
        labels: Shifted labels, int64 [B * (S - 1)], row by row.
        batch: ``OWN`` and ``PART`` tell rows apart.
    """
    if OWN not in batch and PART not in batch:
        return sums_of(labels)
    length = batch["labels"].shape[1] - 1

    def of_rows(rows: Tensor) -> LossSums:
        # the loss picks rows before it multiplies: as many products as for the whole batch
        return sums_of(labels.masked_fill(~rows.repeat_interleave(length), MASKED))

    mine = batch[OWN].bool() if OWN in batch else None
    texts = batch[PART].bool() if PART in batch else None
    found: list[tuple[int, bool, LossSums]] = []
    # a call holds a gradient of the head until the backward pass, so texts that are not in the batch get none
    numbers = [0] if texts is None else [number for number, there in enumerate(texts.any(0).tolist()) if there]
    for number in numbers:
        rows = torch.ones_like(batch["labels"][:, 0], dtype=torch.bool) if texts is None else texts[:, number]
        found += (
            [(number, True, of_rows(rows & mine)), (number, False, of_rows(rows & ~mine))]
            if mine is not None
            else [(number, False, of_rows(rows))]
        )
    whole = {part.name: reduce(torch.add, [getattr(sums, part.name) for _, _, sums in found]) for part in fields(LossSums)}
    own = [sums for _, is_own, sums in found if is_own]
    more: dict[str, Any] = {}
    if mine is not None:
        more |= {"own_tokens": reduce(torch.add, [one.tokens for one in own]), "own_kl": reduce(torch.add, [one.kl for one in own])}
    if texts is not None:
        parts = torch.zeros(texts.shape[1], len(PART_SUMS), dtype=torch.float64, device=labels.device)
        for number, _, sums in found:
            parts[number] += torch.stack([getattr(sums, name).detach().to(torch.float64) for name in PART_SUMS])
        more["parts"] = parts
    return SplitSums(**whole, **more)
