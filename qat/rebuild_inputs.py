"""Rounds inputs, keys and values of a rebuilt model as its export specifies: like serving kernels, or like the package in transformers.

Kernels divide a token's absmax by 127 (vLLM's int8 kernels, and decoct in training), compressed-tensors by 127.5; bitsandbytes rounds
inputs to fp16 first. So their logits differ by design. A rebuilt model computes like the kernels, or like the package for the comparison
with transformers, which uses it. Both round keys and values in fp8 in the same way.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..models.calibration.token_rows import with_input
from .codes.kv_cache_scales import CacheState
from .fake_quant.activations import fake_quant_activation
from .layers.kv_cache_hooks import round_cache_as_stored
from .readers.bitsandbytes import BitsandbytesFolder
from .readers.compressed_tensors import Inputs, PackedFolder
from .readers.open import ExportReader
from .spec import ActivationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Arithmetic = Literal["kernels", "package"]
"""Whose rounding of inputs: of serving kernels, as in training, or of the package that transformers uses for the format."""


def hook_inputs(model: nn.Module, opened: ExportReader, arithmetic: Arithmetic, modules: Mapping[str, str]) -> None:
    """Hook the rounding of inputs into every module of ``model`` whose inputs the export rounds.

    ``modules`` maps export names to model names where they differ.
    """
    if isinstance(opened, BitsandbytesFolder) and not opened.nf4:
        spec = ActivationSpec(outliers=opened.threshold or None)
        for name in opened.modules:
            rounding = partial(fake_quant_activation if arithmetic == "kernels" else like_bitsandbytes, spec=spec)
            model.get_submodule(modules.get(name, name)).register_forward_pre_hook(partial(_hook, rounding), with_kwargs=True)
        return
    # the other formats cannot say that inputs are rounded
    if not isinstance(opened, PackedFolder):
        return
    for name in opened.modules:
        inputs = opened.inputs(name)
        if inputs is not None:
            rounding = partial(like_kernels if arithmetic == "kernels" else like_package, inputs=inputs)
            model.get_submodule(modules.get(name, name)).register_forward_pre_hook(partial(_hook, rounding), with_kwargs=True)


def hook_cache(model: "PreTrainedModel", opened: ExportReader, modules: Mapping[str, str]) -> None:
    """Make the model round keys and values as the export specifies; UserError if the scales belong to other modules.

    ``modules`` maps export names to model names where they differ.
    """
    scales = opened.cache() if isinstance(opened, PackedFolder) else None
    if scales is None:
        return
    # each attention has two scales, for keys and for values
    attentions = tuple(dict.fromkeys(name.rpartition(".")[0] for name in scales))
    spec = ActivationSpec(kind="fp8_e4m3", scaling="static")
    # the reader gives Python floats of fp32 numbers, so the tensors have the stored bits
    numbers = {name: torch.tensor(scale) for name, scale in scales.items()}
    round_cache_as_stored(model, CacheState(spec=spec, attentions=attentions, scales=numbers).renamed(modules))


def _hook(rounding: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return with_input(args, kwargs, rounding)


def like_kernels(x: Tensor, inputs: Inputs) -> Tensor:
    """Round inputs [..., features] as ``fake_quant_activation`` does."""
    spec = ActivationSpec(kind=inputs.kind, scaling="dynamic" if inputs.dynamic else "static", symmetric=inputs.symmetric)  # pyright: ignore[reportArgumentType] - the reader's kinds are those of the spec
    if inputs.scale is None:
        return fake_quant_activation(x, spec)
    # in the shape of the scale, as the fake quantization takes them
    zero = None if inputs.symmetric else torch.tensor([inputs.zero], dtype=torch.int8)
    return fake_quant_activation(x, spec, scale=torch.tensor([inputs.scale]), zero=zero)


def like_package(x: Tensor, inputs: Inputs) -> Tensor:
    """Round inputs fp32 [..., features] as compressed-tensors does (``quantization/utils/helpers.py``, ``calculate_qparams``)."""
    # floats have no spare code at one end, so both divide by the same number
    if inputs.kind != "int8":
        return like_kernels(x, inputs)
    if inputs.scale is not None:
        scale, zero = torch.tensor(inputs.scale), torch.tensor(float(inputs.zero))
    else:
        low, high = x.amin(-1, keepdim=True).clamp(max=0.0), x.amax(-1, keepdim=True).clamp(min=0.0)
        # half of 255 steps when symmetric, where +absmax is clipped to 127; the whole range in 255 steps otherwise
        scale = torch.maximum(-low, high) / 127.5 if inputs.symmetric else (high - low) / 255
        # the package's own guard for tokens that are all zero
        scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
        zero = torch.zeros(()) if inputs.symmetric else (-128 - low / scale).clamp(-128, 127).round()
    # clamped, then rounded, in the order of the package
    return ((x / scale + zero).clamp(-128, 127).round() - zero) * scale


def like_bitsandbytes(x: Tensor, spec: ActivationSpec) -> Tensor:
    """Round inputs [..., tokens, features] as bitsandbytes does (``backends/default/ops.py``, ``int8_vectorwise_quant``): from fp16, times
    the inverse of the scale, with every column as it is that holds an outlier in any of the tokens."""
    rows = x.reshape(-1, x.shape[-1])
    half = rows.half()
    large = half.abs() >= (spec.outliers or torch.inf)
    rest = half.masked_fill(large, 0)
    absmax = rest.abs().amax(-1, keepdim=True).float()
    rounded = (rest * (127 / absmax)).round().nan_to_num() * (absmax / 127)
    return torch.where(large.any(0), rows, rounded.to(x.dtype)).view(x.shape)
