"""Saves a model and its codes as a quantized folder, which ``decoct export``, ``verify`` and ``evaluate`` read."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...models.folder.model_folder import save_model_folder
from ..codes.state import QUANT_FILE, QuantState
from .quantized_model import fold

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STORED = torch.bfloat16
"""Dtype of unquantized tensors in exports and runtimes."""


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
    """Saves a model whose weights are codes times scales, together with the codes, as the stages ``qat`` and ``quantize`` do.

    Args:
        model: The student, prepared for quantized training or with plain layers, in fp32. Afterwards it has plain layers with the weights
            of ``state``, and every other tensor is rounded to bf16 as in exports, so that the model in memory equals the one on disk.
        state: Its codes and scales, from ``quantize_model`` or ``round_model``.
        path: The folder to create; it must not exist.
        tokenizer: Saved too. An export needs one; its files may also be copied into the folder later.
        base_model: Hub id or name of the model it was made from, for the model card.
        record: Further entries of decoct.json.
        rounding: How codes and scales were found, for decoct.json.

    Returns:
        ``path``.

    Raises:
        UserError: the state is of another model, the model is not fp32, ``path`` exists, or writing fails; nothing is left behind.
        NonFiniteError: a weight is NaN or infinite; nothing is written.
    """
    # 1. the model becomes what is stored: codes * scales, and every other tensor in bf16
    fold(model, state)
    round_unquantized(model, state)
    quant = {**state.record(), **({"rounding": rounding} if rounding else {})}
    named = {"base_model": base_model} if base_model else {}
    whole = {"kind": "quantize", **named, **(record or {}), "quant": quant}
    # 2. in fp32, which holds codes * scales exactly; bf16 would round products of 8-bit codes and 8-bit scales
    return save_model_folder(Path(path), model, tokenizer, whole, dtype=torch.float32, extra_tensors={QUANT_FILE: state.tensors()})


def round_unquantized(model: "PreTrainedModel", state: QuantState) -> None:
    """Rounds every unquantized tensor to bf16 in place, as exports store it and runtimes use it."""
    quantized = {f"{name}.weight" for name in state.modules}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in quantized:
                continue
            # there and back: the dtype stays fp32, the values are those of bf16
            stored = parameter.to(STORED).to(parameter.dtype)
            # a parameter may be a view of a memory-mapped file: writing to its pages would copy them into memory
            if not torch.equal(stored, parameter):
                parameter.copy_(stored)
