"""Calibration text of a stage: windows of its training text, chosen by the recipe's seed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...models.batches import check_packing
from ...models.calibration.calibration_text import CalibrationText
from ...models.common.errors import UserError
from ..data.order import WindowOrder
from ..data.windows import Windows
from ..plan import derive_seed
from ..rounding_settings import BATCH_TOKENS as BATCH_TOKENS
from .context import StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def calibration_text(windows: Windows, tokens: int, seed: int) -> CalibrationText:
    """Windows in a random order until they hold ``tokens`` tokens, or all of them.

    The order depends only on ``seed`` and the number of windows: two stages of a recipe calibrate on the same text, and a larger ``tokens``
    keeps the same windows and adds more. Of a blend the windows come in its shares, each once. Prompts of conversations count as text;
    padding is masked.

    Args:
        windows: Training windows.
        tokens: Number of tokens to collect, not counting padding; the last window is taken whole.
        seed: Seed of the recipe.
    """
    chosen: list[dict[str, torch.Tensor]] = []
    left = tokens
    for index in WindowOrder(windows, derive_seed(seed, "calibration")).once():
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


def told_text(
    context: StageContext, model: "PreTrainedModel", tokens: int, *, method: str, widths: Mapping[str, int] | None, otherwise: str
) -> CalibrationText:
    """``calibration_text`` of the stage, which is checked and printed.

    Args:
        context: Context of the stage.
        model: Model that reads it.
        tokens: Number of tokens to collect.
        method: Name of the method, for the message.
        widths: Inputs of each linear, where the method needs at least as many tokens as the widest has; None = any number does.
        otherwise: What else can be done, as the end of a sentence.

    Raises:
        UserError: the text is too short, or packed windows do not suit the model (``check_packing``).
    """
    if context.run.data.packed:
        # the method would otherwise calibrate on hidden states that mix documents
        check_packing(model, f"{context.name}: the student")
    train = context.run.data.train
    text = calibration_text(train, tokens, context.run.seed)
    widest = max(widths, key=lambda name: widths[name]) if widths else ""
    needed = widths[widest] if widths else 1
    # with fewer tokens than inputs the Hessian X^T X is singular
    if text.tokens < needed:
        has = f"{widest} has {needed:,} inputs, and method {method} needs at least as many tokens" if widest else f"{method} needs some"
        raise UserError(
            f"{context.name}: {text.tokens:,} tokens are too few to calibrate on: {has} (calibration_tokens={tokens:,}, training text "
            f"{train.tokens:,} tokens); raise calibration_tokens, give more text, or {otherwise}"
        )
    fewer = f", fewer than the {tokens:,} requested" if text.tokens < tokens else ""
    context.say(f"  calibrates on {text.tokens:,} tokens in {window_count(text):,} windows{fewer} (sha256 {text.fingerprint()[:12]})")
    return text


def window_count(text: CalibrationText) -> int:
    """Windows of all batches."""
    return sum(len(batch["input_ids"]) for batch in text.batches)


def text_record(text: CalibrationText) -> dict[str, Any]:
    """What decoct.json says of calibration text."""
    return {"tokens": text.tokens, "windows": window_count(text), "sha256": text.fingerprint()}
