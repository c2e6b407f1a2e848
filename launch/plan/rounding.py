"""What rounding after training takes, from shapes alone: the work is done one decoder layer at a time, on one GPU or on the CPU.

The peak is everything outside the layers, one layer with its codes, all its Hessians, and either a batch on its way through it or the
widest weights while they are rounded. Linears are taken to share inputs as in a Llama.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...models.families import FUSED
from .fitting import usable
from .shapes import ModelShape, StageShape, quantized_linears

if TYPE_CHECKING:
    from ...qat.lattices import Lattices
    from ...qat.ptq import Rounding
    from ...trainer.quantization_settings import QuantizeSettings


@dataclass(frozen=True, kw_only=True)
class RoundingPlan:
    """What a quantize stage takes."""

    method: str
    tokens: int
    """Calibration tokens, fewer when the text has fewer; 0 when the method looks at none."""
    flop: float
    """Floating point operations of calibration: two or three forward passes, second moments, and rounding against them; 0 without."""
    device_bytes: int
    """On the GPU that it runs on; 0 without one."""
    host_bytes: int
    """Host memory."""
    streamed: bool
    """Whether the model is read and written layer by layer."""
    work_bytes: int
    """Files beside the result, which are gone at the end."""
    fits: bool | None
    """None when the memory of the device is unknown."""


_FITTING = 2**25  # four matrices of 2^21 numbers


@dataclass(frozen=True)
class _Stack:
    """Linears with the same input."""

    outputs: int
    inputs: int


def rounding_plan(
    settings: "QuantizeSettings", shape: StageShape, seq_length: int, *, on_gpu: bool, gpu_memory: int | None
) -> RoundingPlan:
    """The plan of one stage.

    Args:
        on_gpu: Whether there is a GPU to work on.
        gpu_memory: Its bytes, if known.
    """
    from ...trainer.stages.quantize import memory_in_whole, rounding_of, wants_streaming

    model, rounding = shape.before, rounding_of(settings)
    needs = rounding.needs
    tokens, fitted = settings.calibration_tokens or 0, settings.scale == "fitted"
    assert shape.lattices is not None
    layers = _stacks(model, shape.lattices, shared=needs != "nothing")
    batch = _batch_bytes(model, seq_length) if tokens else 0
    codes = max((sum(stack.outputs * stack.inputs for stack in stacks) for stacks in layers), default=0)
    around = 4 * (model.outside + model.layer) + codes
    work = max((_layer_bytes(stacks, needs, batch, fitted) for stacks in layers), default=0)
    streamed = wants_streaming(settings, model.parameters)
    host = (4 * model.outside if on_gpu else around) if streamed else memory_in_whole(model.parameters)
    device = around + work if on_gpu else 0
    return RoundingPlan(
        method=settings.method,
        tokens=tokens,
        flop=_flop(model, layers, rounding, tokens),
        device_bytes=device,
        # hidden states of every token are kept between layers
        host_bytes=host + 4 * model.hidden * tokens + (0 if on_gpu else work),
        streamed=streamed,
        work_bytes=_work_files(model, shape) if streamed else 0,
        fits=None if gpu_memory is None else device <= usable(gpu_memory),
    )


def _stacks(model: ModelShape, lattices: "Lattices", *, shared: bool) -> list[list[_Stack]]:
    """The stacks of each layer that has linears to round."""
    layers: dict[str, dict[Any, _Stack]] = {}
    for name, (rows, columns, _) in quantized_linears(model, lattices).items():
        if name not in model.linears:
            continue
        parts = name.split(".")
        number = next((part for part in parts if part.isdigit()), "")
        together = next((names for names in FUSED if shared and parts[-1] in names), name)
        stacks = layers.setdefault(number, {})
        before = stacks[together].outputs if together in stacks else 0
        stacks[together] = _Stack(before + rows, columns)
    return [list(stacks.values()) for stacks in layers.values()]


def _layer_bytes(stacks: list[_Stack], needs: str, batch: int, fitted: bool) -> int:
    """Bytes of work on one layer, beside its weights and codes."""
    whole = needs == "hessian"
    moments = 4 * sum(stack.inputs**2 for stack in stacks) if whole else 0
    return moments + max(batch, *(_stack_bytes(stack, whole, fitted) for stack in stacks))


def _stack_bytes(stack: _Stack, whole: bool, fitted: bool) -> int:
    """Bytes of rounding one stack."""
    weights = stack.outputs * stack.inputs
    # weight, what is left of it and its difference in fp32, and codes twice
    rounding = 4 * 4 * weights + 2 * weights
    if not whole:
        return rounding
    factor = 4 * stack.inputs**2
    # fitting keeps the codes before, and works on a few rows at a time
    more = weights + _FITTING if fitted else 0
    # the factor stays while codes are found; before, the damped matrix and its Cholesky factor are beside it
    return max(3 * factor, factor + rounding + more)


def _batch_bytes(model: ModelShape, seq_length: int) -> int:
    """Bytes of a batch inside a layer, fp32: the gated FFN or attention is the widest, with the layer's own input and normalised input."""
    from ...trainer.stages.calibration import BATCH_TOKENS

    text: Any = model.config.get_text_config()
    tokens = max(1, BATCH_TOKENS // seq_length) * seq_length
    return 4 * tokens * (3 * max(text.intermediate_size, text.hidden_size) + 3 * text.hidden_size)


def _flop(model: ModelShape, layers: list[list[_Stack]], rounding: "Rounding", tokens: int) -> float:
    if not tokens:
        return 0.0
    # each layer runs for its moments, for ranges behind static scales, and once more rounded; nothing follows the last one
    looks = (rounding.needs != "nothing") + rounding.observes
    passes = 2.0 * tokens * model.linear * (looks + 1 - 1 / max(1, model.layers))
    if rounding.needs != "hessian":
        return passes
    stacks = [stack for layer in layers for stack in layer]
    moments = sum(2.0 * tokens * stack.inputs**2 for stack in stacks)
    # codes once; or codes twice, the equations of two fits, and two errors to choose by
    products = 12 if rounding.scale == "fitted" else 1
    return passes + moments + sum(stack.inputs**3 / 3 + products * stack.outputs * stack.inputs**2 for stack in stacks)


def _work_files(model: ModelShape, shape: StageShape) -> int:
    """The rounded layers on their way: fp32 weights, codes and scales."""
    assert shape.lattices is not None
    linears = [one for name, one in quantized_linears(model, shape.lattices).items() if name in model.linears]
    codes = sum(one.rows * one.columns for one in linears)
    return 4 * (model.parameters - model.outside) + codes + 4 * sum(one.scales for one in linears)
