"""Calibration text of a stage: windows of its training text, chosen by the recipe's seed."""

import torch

from ...qat.ptq import CalibrationText
from ..data.order import sample_order
from ..data.windows import Windows
from ..plan import derive_seed

BATCH_TOKENS = 4096
"""Tokens of a forward pass, padding included; always the same, so that sums are added in the same order everywhere."""


def calibration_text(windows: Windows, tokens: int, seed: int) -> CalibrationText:
    """Windows in a random order until they hold ``tokens`` tokens, or all of them.

    The order depends on ``seed`` and the number of windows alone: two stages of a recipe calibrate on the same text, and more tokens take
    the same windows and further ones. Prompts of conversations are text like any other; padding is masked.

    Args:
        windows: Training windows.
        tokens: How many tokens are wanted, padding left out; the last window is taken whole.
        seed: The recipe's.
    """
    chosen: list[dict[str, torch.Tensor]] = []
    left = tokens
    for index in sample_order(len(windows), derive_seed(seed, "calibration"), 0).tolist():
        if left <= 0:
            break
        row = windows[index]
        left -= int(row["attention_mask"].sum())
        chosen.append({key: value for key, value in row.items() if key != "labels"})
    size = max(1, BATCH_TOKENS // windows.seq_length)
    batches = [chosen[at : at + size] for at in range(0, len(chosen), size)]
    return CalibrationText(batches=[{key: torch.stack([row[key] for row in batch]) for key in batch[0]} for batch in batches])
