"""Keys of windows by content, so that a cache does not depend on order, batches, shuffling or the number of processes."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...losses.shift import MASKED

KEY_BYTES = 16


def sequence_keys(batch: Mapping[str, Tensor]) -> list[bytes]:
    """Hash per window over its tokens, which of them are predicted, and where documents begin.

    Args:
        batch: input_ids, labels and, for packed windows, position_ids; each [B, S] int64.
    """
    # labels only as a mask: which tokens are predicted decides which positions have a row, their ids are in input_ids
    parts = [batch["input_ids"].to(torch.int32), (batch["labels"] != MASKED).to(torch.int32)]
    if "position_ids" in batch:
        parts.append(batch["position_ids"].to(torch.int32))
    # [B, 2 or 3, S] little-endian, so that the keys are the same on every machine
    table = torch.stack(parts, 1).cpu().numpy().astype("<i4")
    return [hashlib.blake2b(row.tobytes(), digest_size=KEY_BYTES).digest() for row in table]


def noise_of(key: bytes, rows: int, columns: int) -> Tensor:
    """[rows, columns] fp32 in [0, 1) that depends only on the key (raw PCG64 words, whose stream numpy guarantees)."""
    words = np.random.PCG64(np.random.SeedSequence(int.from_bytes(key, "little"))).random_raw(rows * columns)
    # 24 bits, which fp32 holds exactly: more bits could round up to 1
    return torch.from_numpy((words >> 40).astype(np.float32) * np.float32(2**-24)).view(rows, columns)
