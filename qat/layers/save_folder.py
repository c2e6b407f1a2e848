"""From a model and its codes to a quantized folder, which ``decoct export``, ``verify`` and ``evaluate`` take."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...models.folder.model_folder import save_model_folder
from ..codes.state import QUANT_FILE, QuantState
from .quantized_model import fold

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STORED = torch.bfloat16
"""The grid of tensors that are not quantized: what exports store and runtimes compute with."""


def save_quantized_folder(
    model: "PreTrainedModel",
    state: QuantState,
    path: Path | str,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    base_model: str | None = None,
    record: dict[str, Any] | None = None,
    rounding: dict[str, Any] | None = None,
) -> Path:
    """Write a model whose weights are codes times scales, with the codes beside them, as the stages ``qat`` and ``quantize`` do.

    Args:
        model: The student, prepared for quantized training or with plain layers, in fp32. Afterwards it has plain layers whose weights are
            those of ``state``, and every other tensor lies on the bf16 grid, as exports store it: the model in memory is the one on disk.
        state: Its codes and scales, as ``quantize_model`` and ``round_model`` give them.
        path: The folder to make; it must not exist.
        tokenizer: Goes along. An export needs one; its files may also be copied into the folder later.
        base_model: Hub id or name that the model was made from, for the model card.
        record: Further entries of decoct.json.
        rounding: How codes and scales were found, for decoct.json.

    Returns:
        ``path``.

    Raises:
        UserError: the state is of another model, the model is not fp32, ``path`` exists, or the disk refuses; nothing is left behind.
        NonFiniteError: a weight is NaN or infinite; nothing is written.
    """
    fold(model, state)
    round_unquantized(model, state)
    quant = {**state.record(), **({"rounding": rounding} if rounding else {})}
    named = {"base_model": base_model} if base_model else {}
    whole = {"kind": "quantize", **named, **(record or {}), "quant": quant}
    return save_model_folder(Path(path), model, tokenizer, whole, dtype=torch.float32, extra_tensors={QUANT_FILE: state.tensors()})


def round_unquantized(model: "PreTrainedModel", state: QuantState) -> None:
    """Put every tensor that is not quantized onto the bf16 grid, in place: the values that exports store and runtimes use."""
    quantized = {f"{name}.weight" for name in state.modules}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in quantized:
                continue
            stored = parameter.to(STORED).to(parameter.dtype)
            # writing to pages of a mapped file would take memory for them
            if not torch.equal(stored, parameter):
                parameter.copy_(stored)
