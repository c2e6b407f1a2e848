"""Calibration text: windows of tokens, with a fingerprint that identifies them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .replay import Batch


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """Batches of windows, in order."""

    batches: Sequence[Batch]
    """``input_ids`` and, as ``backbone_inputs`` takes them, ``attention_mask`` (padding after the text) and ``position_ids``."""

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return sum(len(row) for row in self._rows())

    def fingerprint(self) -> str:
        """sha256 over each window's number of tokens and token ids (int32, little-endian); the same for every batching and padding."""
        digest = hashlib.sha256()
        for row in self._rows():
            # the length separates windows: the same ids cut elsewhere are another text
            digest.update(len(row).to_bytes(8, "little"))
            digest.update(row.to(torch.int32).numpy().astype("<i4").tobytes())
        return digest.hexdigest()

    def _rows(self) -> list[torch.Tensor]:
        """The ids of each window, without padding."""
        rows = []
        for batch in self.batches:
            kept = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"], dtype=torch.bool)
            rows += [ids[mask].cpu() for ids, mask in zip(batch["input_ids"], kept)]
        return rows
