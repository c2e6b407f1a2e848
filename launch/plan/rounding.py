"""Resources of post-training quantization, from shapes alone; it works on one decoder layer at a time, on one GPU or on the CPU.

The peak is everything outside the layers, one layer with its codes, one Hessian, and either a batch on its way through the layer or the
widest weights while they are rounded. Linears are taken to share inputs, and to run, as in a Llama.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...models.calibration.limits import KEPT_BYTES
from ...models.fused_linears import FUSED
from ...qat.ptq_limits import TWICE_TO
from ...qat.transforms.limits import ROTATED_AT_ONCE, SEARCHED
from .fitting import usable
from .quantized_shapes import quantized_linears
from .shapes import ModelShape
from .stage_shapes import StageShape

if TYPE_CHECKING:
    from ...qat.rounding_method import RoundingMethod
    from ...qat.scheme import QuantScheme
    from ...qat.transforms.settings import TransformSettings
    from ...trainer.settings_quantization import QuantizeSettings


@dataclass(frozen=True, kw_only=True)
class RoundingPlan:
    """Resources of a quantize stage."""

    method: str
    transform: str | None
    """What is done to the weights before they are rounded; None = nothing."""
    tokens: int
    """Calibration tokens at most (the text may have fewer); 0 for methods without calibration."""
    flop: float
    """Floating point operations of calibration: one to three forward passes, second moments, and rounding against them; 0 without."""
    device_bytes: int
    """Bytes on the GPU; 0 without one."""
    host_bytes: int
    """Bytes of host memory."""
    streamed: bool
    """Whether the model is read and written layer by layer."""
    work_bytes: int
    """Bytes of temporary files, which are deleted at the end."""
    fits: bool | None
    """Whether it fits the device; None if its memory is unknown."""


_FITTING = 2**24  # four matrices of 2^20 numbers


@dataclass(frozen=True)
class _Stack:
    """Linears with the same input."""

    outputs: int
    inputs: int


def rounding_plan(
    settings: "QuantizeSettings", shape: StageShape, seq_length: int, *, on_gpu: bool, gpu_memory: int | None
) -> RoundingPlan:
    """Plan the rounding of one stage.

    Args:
        on_gpu: Whether there is a GPU to work on.
        gpu_memory: Its bytes, if known.
    """
    from ...trainer.rounding_settings import memory_in_whole, rounding_of, wants_streaming

    # a rotation may untie the head
    model, rounding = shape.after, rounding_of(settings)
    needs = rounding.needs
    tokens, fitted = settings.calibration_tokens or 0, settings.scale == "fitted"
    assert shape.scheme is not None
    # what is measured on an input holds for all linears that read it; where nothing is measured, each is rounded alone
    layers = _stacks(model, shape.scheme, shared=rounding.needs != "nothing" or rounding.transforms_on_text)
    batch = _batch_bytes(model, seq_length) if tokens else 0
    # one layer is worked on at a time, so the largest decides
    codes = max((sum(stack.outputs * stack.inputs for stack in stacks) for stacks in layers), default=0)
    # embedding, norms and head, and the layer that is being rounded, in fp32
    around = 4 * (model.outside + model.layer) + codes
    work = max((_layer_bytes(stacks, needs, batch, fitted) for stacks in layers), default=0)
    if rounding.transform is not None:
        work = max(work, _transform_bytes(model, layers, rounding.transform, batch))
    # decided from the files of the input
    streamed = wants_streaming(settings, shape.before.parameters)
    # streamed to a GPU, the host holds only what is around the layers
    host = (4 * model.outside if on_gpu else around) if streamed else memory_in_whole(model.parameters)
    device = around + work if on_gpu else 0
    return RoundingPlan(
        method=settings.method,
        transform=None if rounding.transform is None else rounding.transform.method,
        tokens=tokens,
        flop=_flop(model, layers, rounding, tokens, twice=shape.scheme.weights.bits <= TWICE_TO),
        device_bytes=device,
        # calibration keeps the hidden states of all tokens on the host, in fp32
        host_bytes=host + 4 * tokens * (model.hidden + _kept_inputs(model, layers, needs, tokens)) + (0 if on_gpu else work),
        streamed=streamed,
        work_bytes=_work_files(model, shape) if streamed else 0,
        fits=None if gpu_memory is None else device <= usable(gpu_memory),
    )


def _stacks(model: ModelShape, scheme: "QuantScheme", *, shared: bool) -> list[list[_Stack]]:
    """Return the stacks of each layer that has linears to round."""
    layers: dict[str, dict[Any, _Stack]] = {}
    for name, (rows, columns, _) in quantized_linears(model, scheme).items():
        if name not in model.linears:
            continue
        parts = name.split(".")
        # the first number in a name is that of the layer; experts have a second one
        number = next((part for part in parts if part.isdigit()), "")
        # linears of one input share its Hessian, so their weights are stacked and rounded in one pass
        together = next((names for names in FUSED if shared and parts[-1] in names), name)
        stacks = layers.setdefault(number, {})
        before = stacks[together].outputs if together in stacks else 0
        stacks[together] = _Stack(before + rows, columns)
    return [list(stacks.values()) for stacks in layers.values()]


def _transform_bytes(model: ModelShape, layers: list[list[_Stack]], transform: "TransformSettings", batch: int) -> int:
    """Return the bytes of a transform's work, without the weights that it changes."""
    if transform.method == "rotation":
        # the result of the largest matrix or table, and a part of it four times in fp64
        largest = max((stack.outputs * stack.inputs for stacks in layers for stack in stacks), default=0)
        numbers = max(largest, model.vocabulary * model.hidden if transform.residual else 0)
        return 4 * numbers + 4 * 8 * min(numbers, ROTATED_AT_ONCE)
    if transform.method == "smoothquant":
        return batch
    # the second moments of all inputs of a layer at once, with a batch on its way, or a stack, its rounding and its error; clipping
    # has one more copy of the weights, and the moments behind their scales
    copies, moments = (6, 2) if transform.clip else (5, 0)
    return max(
        (
            sum(4 * stack.inputs**2 for stack in stacks)
            + max(batch, *(4 * copies * stack.outputs * stack.inputs + 4 * moments * stack.inputs**2 for stack in stacks))
            for stacks in layers
            if stacks
        ),
        default=0,
    )


def _layer_bytes(stacks: list[_Stack], needs: str, batch: int, fitted: bool) -> int:
    """Return the bytes of work on one layer, without its weights and codes."""
    whole = needs == "hessian"
    return max((4 * stack.inputs**2 if whole else 0) + max(batch, _stack_bytes(stack, whole, fitted)) for stack in stacks)


def _stack_bytes(stack: _Stack, whole: bool, fitted: bool) -> int:
    """Return the bytes for rounding one stack."""
    weights = stack.outputs * stack.inputs
    if not whole:
        # two copies of the remaining weights and their values, all in fp32; codes twice
        return 3 * 4 * weights + 2 * weights
    # weights, what is rounded of them and its errors in fp32, and codes twice
    rounding = 4 * 4 * weights + 2 * weights
    factor = 4 * stack.inputs**2
    # fitting keeps the previous codes, and works on a few rows at a time
    more = weights + _FITTING if fitted else 0
    # the factor is kept while codes are found; before that, the damped matrix and its Cholesky factor exist too
    return max(3 * factor, factor + rounding + more)


def _batch_bytes(model: ModelShape, seq_length: int) -> int:
    """Return the bytes of a batch inside a layer, fp32: the gated FFN or attention is the widest, with the layer's own input and
    normalised input."""
    from ...trainer.rounding_settings import BATCH_TOKENS

    # whole windows, and at least one
    tokens = max(1, BATCH_TOKENS // seq_length) * seq_length
    return 4 * tokens * (3 * max(model.dimensions.ffn, model.hidden) + 3 * model.hidden)


def _kept_inputs(model: ModelShape, layers: list[list[_Stack]], needs: str, tokens: int) -> int:
    """Return the numbers per token that a layer keeps in addition to its hidden states during calibration: the inputs of the last linears
    of attention and FFN, if they are no wider than the hidden states or small enough."""
    if needs == "nothing":
        return 0
    # outputs as wide as the hidden states: the last linears of attention and FFN
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
    stacks = [stack for layer in layers for stack in layer]
    runs = (rounding.needs != "nothing") + rounding.observes + rounding.transforms_on_text + again * (1 - 1 / max(1, model.layers))
    passes = 2.0 * tokens * model.linear * runs
    if rounding.transform is not None and rounding.transform.method == "awq":
        # second moments, and a product with them for each point of the grid and for no scales
        passes += sum(2.0 * tokens * stack.inputs**2 + SEARCHED * 2.0 * stack.outputs * stack.inputs**2 for stack in stacks)
    if rounding.needs != "hessian":
        return passes
    # X^T X of each input; the Cholesky factorization below takes n^3 / 3
    moments = sum(2.0 * tokens * stack.inputs**2 for stack in stacks)
    # products for the codes; a fit adds two more, and repeats them in a second pass
    products = (6 if twice else 3) if rounding.scale == "fitted" else 1
    return passes + moments + sum(stack.inputs**3 / 3 + products * stack.outputs * stack.inputs**2 for stack in stacks)


def _work_files(model: ModelShape, shape: StageShape) -> int:
    """Return the bytes of rounded layers on disk before they are joined: fp32 weights, codes and scales."""
    assert shape.scheme is not None
    linears = [one for name, one in quantized_linears(model, shape.scheme).items() if name in model.linears]
    codes = sum(one.rows * one.columns for one in linears)
    return 4 * (model.parameters - model.outside) + codes + 4 * sum(one.scales for one in linears)
