"""Stage `quantize`: round the weights without training (round to nearest)."""

import time
from typing import TYPE_CHECKING, Any

import torch

from ...models.folder import save_model_folder
from ...qat.modules import fold, quantize_model
from ...qat.state import QuantState
from ..settings import QuantizeSettings
from .context import StageContext, StageResult
from .opening import whole_student
from .saving import stage_record
from .training import sparse_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def finish(settings: QuantizeSettings, context: StageContext, trained: None) -> StageResult:
    """Round, fold and write the quantized folder (rank 0)."""
    started = time.perf_counter()
    student = whole_student(context)
    state = quantize_model(student, settings.weights, settings.skip)
    fold(student, state)
    save_quantized(student, state, context, {"sparse": sparse_modules(context.input)})
    return StageResult(model=context.model, seconds=time.perf_counter() - started)


def round_unquantized(model: "PreTrainedModel", state: QuantState) -> None:
    """Put every tensor that is not quantized onto the bf16 grid, in place: the values that exports store and runtimes use."""
    quantized = {f"{name}.weight" for name in state.modules}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in quantized:
                parameter.copy_(parameter.to(torch.bfloat16))


def save_quantized(model: "PreTrainedModel", state: QuantState, context: StageContext, facts: dict[str, Any]) -> None:
    """Write q * s in fp32 under the original names, with codes and scales beside it in quant.safetensors."""
    round_unquantized(model, state)
    save_model_folder(
        context.model,
        model,
        context.tokenizer,
        stage_record(context, {**facts, "quant": state.record()}),
        dtype=torch.float32,
        extra_tensors={"quant.safetensors": state.tensors()},
    )
