"""Calibration text: some windows of tokens, and a fingerprint by which to tell them from others."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .replay import Batch


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """Batches of windows, in order."""

    batches: Sequence[Batch]
    """``input_ids`` and, as ``backbone_inputs`` knows them, ``attention_mask`` (padding behind the text) and ``position_ids``."""

    @property
    def tokens(self) -> int:
        """Tokens of text, padding left out."""
        return sum(len(row) for row in self._rows())

    def fingerprint(self) -> str:
        """sha256 over the token ids of each window (int32, little-endian, behind their number); batching and padding play no part."""
        digest = hashlib.sha256()
        for row in self._rows():
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
