"""What rounding after training takes, from shapes alone: the work is done one decoder layer at a time, on one GPU or on the CPU.

The peak is everything outside the layers, one layer with its codes, one Hessian, and either a batch on its way through the layer or the
widest weights while they are rounded. Linears are taken to share inputs, and to run, as in a Llama.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...models.fused_linears import FUSED
from ...qat.ptq_limits import KEPT_BYTES, TWICE_TO
from .fitting import usable
from .shapes import ModelShape, StageShape, quantized_linears

if TYPE_CHECKING:
    from ...qat.ptq import RoundingMethod
    from ...qat.scheme import QuantScheme
    from ...trainer.settings_quantization import QuantizeSettings


@dataclass(frozen=True, kw_only=True)
class RoundingPlan:
    """What a quantize stage takes."""

    method: str
    tokens: int
    """Calibration tokens, fewer when the text has fewer; 0 when the method looks at none."""
    flop: float
    """Floating point operations of calibration: one to three forward passes, second moments, and rounding against them; 0 without."""
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


_FITTING = 2**24  # four matrices of 2^20 numbers


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
    assert shape.scheme is not None
    layers = _stacks(model, shape.scheme, shared=needs != "nothing")
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
        flop=_flop(model, layers, rounding, tokens, twice=shape.scheme.weights.bits <= TWICE_TO),
        device_bytes=device,
        host_bytes=host + 4 * tokens * (model.hidden + _kept_inputs(model, layers, needs, tokens)) + (0 if on_gpu else work),
        streamed=streamed,
        work_bytes=_work_files(model, shape) if streamed else 0,
        fits=None if gpu_memory is None else device <= usable(gpu_memory),
    )


def _stacks(model: ModelShape, scheme: "QuantScheme", *, shared: bool) -> list[list[_Stack]]:
    """The stacks of each layer that has linears to round."""
    layers: dict[str, dict[Any, _Stack]] = {}
    for name, (rows, columns, _) in quantized_linears(model, scheme).items():
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
    return max((4 * stack.inputs**2 if whole else 0) + max(batch, _stack_bytes(stack, whole, fitted)) for stack in stacks)


def _stack_bytes(stack: _Stack, whole: bool, fitted: bool) -> int:
    """Bytes of rounding one stack."""
    weights = stack.outputs * stack.inputs
    if not whole:
        # what rounding leaves of the weights, twice, and their values in fp32; codes twice
        return 3 * 4 * weights + 2 * weights
    # weights, what is rounded of them and its errors in fp32, and codes twice
    rounding = 4 * 4 * weights + 2 * weights
    factor = 4 * stack.inputs**2
    # fitting keeps the codes before, and works on a few rows at a time
    more = weights + _FITTING if fitted else 0
    # the factor stays while codes are found; before, the damped matrix and its Cholesky factor are beside it
    return max(3 * factor, factor + rounding + more)


def _batch_bytes(model: ModelShape, seq_length: int) -> int:
    """Bytes of a batch inside a layer, fp32: the gated FFN or attention is the widest, with the layer's own input and normalised input."""
    from ...trainer.stages.calibration import BATCH_TOKENS

    tokens = max(1, BATCH_TOKENS // seq_length) * seq_length
    return 4 * tokens * (3 * max(model.dimensions.ffn, model.hidden) + 3 * model.hidden)


def _kept_inputs(model: ModelShape, layers: list[list[_Stack]], needs: str, tokens: int) -> int:
    """Numbers a token that a layer keeps beside its hidden states while its linears are calibrated: what the last linears of its attention
    and FFN read, where it is no wider than the hidden states or not too much."""
    if needs == "nothing":
        return 0
    widths = [[stack.inputs for stack in stacks if stack.outputs == model.hidden] for stacks in layers]
    return max(sum(width for width in one if width <= model.hidden or 4 * width * tokens <= KEPT_BYTES) for one in widths)


def _flop(model: ModelShape, layers: list[list[_Stack]], rounding: "RoundingMethod", tokens: int, *, twice: bool) -> float:
    if not tokens:
        return 0.0
    # each layer runs for its moments, for ranges behind static scales, and once more where what was kept does not spare it; nothing
    # follows the last one
    serves = rounding.activations is not None or rounding.kv_cache is not None
    widest = max((stack.inputs for layer in layers for stack in layer), default=0)
    again = rounding.needs == "nothing" or serves or 4 * widest * tokens > KEPT_BYTES
    passes = 2.0 * tokens * model.linear * ((rounding.needs != "nothing") + rounding.observes + again * (1 - 1 / max(1, model.layers)))
    if rounding.needs != "hessian":
        return passes
    stacks = [stack for layer in layers for stack in layer]
    moments = sum(2.0 * tokens * stack.inputs**2 for stack in stacks)
    # codes; and of a fit what they pull, and its equations
    products = (6 if twice else 3) if rounding.scale == "fitted" else 1
    return passes + moments + sum(stack.inputs**3 / 3 + products * stack.outputs * stack.inputs**2 for stack in stacks)


def _work_files(model: ModelShape, shape: StageShape) -> int:
    """The rounded layers on their way: fp32 weights, codes and scales."""
    assert shape.scheme is not None
    linears = [one for name, one in quantized_linears(model, shape.scheme).items() if name in model.linears]
    codes = sum(one.rows * one.columns for one in linears)
    return 4 * (model.parameters - model.outside) + codes + 4 * sum(one.scales for one in linears)
