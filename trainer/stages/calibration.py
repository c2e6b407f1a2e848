"""Calibration text of a stage: windows of its training text, chosen by the recipe's seed."""

import torch

from ...qat.ptq import CalibrationText
from ..data.order import sample_order
from ..data.windows import Windows
from ..plan import derive_seed
from ..rounding_settings import BATCH_TOKENS as BATCH_TOKENS

Row = dict[str, torch.Tensor]


def calibration_text(windows: Windows, tokens: int, seed: int) -> CalibrationText:
    """The windows of ``calibration_rows``, in batches of up to ``BATCH_TOKENS`` tokens."""
    return CalibrationText(batches=batched(calibration_rows(windows, tokens, seed), windows.seq_length))


def calibration_rows(windows: Windows, tokens: int, seed: int) -> list[Row]:
    """Windows in a random order until they hold ``tokens`` tokens, or all of them.

    The order depends only on ``seed`` and the number of windows: two stages of a recipe calibrate on the same text, and a larger ``tokens``
    keeps the same windows and adds more. Prompts of conversations count as text; padding is masked.

    Args:
        windows: Training windows.
        tokens: Number of tokens to collect, not counting padding; the last window is taken whole.
        seed: Seed of the recipe.
    """
    chosen: list[Row] = []
    left = tokens
    for index in sample_order(len(windows), derive_seed(seed, "calibration"), 0).tolist():
        if left <= 0:
            break
        row = windows[index]
        # count real tokens only: short documents are padded to the full window
        left -= int(row["attention_mask"].sum())
        # nothing is predicted here, so labels would only take memory
        chosen.append({key: value for key, value in row.items() if key != "labels"})
    return chosen


def batched(rows: list[Row], seq_length: int) -> list[Row]:
    """Windows stacked to batches of up to ``BATCH_TOKENS`` tokens."""
    # one window at least, even when a window is longer than the batch
    size = max(1, BATCH_TOKENS // seq_length)
    groups = [rows[at : at + size] for at in range(0, len(rows), size)]
    return [{key: torch.stack([row[key] for row in group]) for key in group[0]} for group in groups]
