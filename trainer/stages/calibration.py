"""Calibration text of a stage: windows of its training text, chosen by the recipe's seed."""

import torch

from ...qat.ptq import CalibrationText
from ..data.order import sample_order
from ..data.windows import Windows
from ..plan import derive_seed
from ..rounding_settings import BATCH_TOKENS as BATCH_TOKENS


def calibration_text(windows: Windows, tokens: int, seed: int) -> CalibrationText:
    """Windows in a random order until they hold ``tokens`` tokens, or all of them.

    The order depends only on ``seed`` and the number of windows: two stages of a recipe calibrate on the same text, and a larger ``tokens``
    keeps the same windows and adds more. Prompts of conversations count as text; padding is masked.

    Args:
        windows: Training windows.
        tokens: Number of tokens to collect, not counting padding; the last window is taken whole.
        seed: Seed of the recipe.
    """
    chosen: list[dict[str, torch.Tensor]] = []
    left = tokens
    for index in sample_order(len(windows), derive_seed(seed, "calibration"), 0).tolist():
        if left <= 0:
            break
        row = windows[index]
        # count real tokens only: short documents are padded to the full window
        left -= int(row["attention_mask"].sum())
        # nothing is predicted here, so labels would only take memory
        chosen.append({key: value for key, value in row.items() if key != "labels"})
    # one window at least, even when a window is longer than the batch
    size = max(1, BATCH_TOKENS // windows.seq_length)
    batches = [chosen[at : at + size] for at in range(0, len(chosen), size)]
    return CalibrationText(batches=[{key: torch.stack([row[key] for row in batch]) for key in batch[0]} for batch in batches])
