"""A teacher whose decoder linears are quantized by bitsandbytes: nf4 (QLoRA, arXiv 2305.14314) or int8 (LLM.int8(), arXiv 2208.07339).

The model is built on the meta device and filled one tensor at a time, so that it never needs more memory than its quantized form.
Embedding, norms and head stay bf16, and so does the arithmetic of nf4; int8 multiplies in 8 bits, with input columns above 6.0 in fp16.
Both also run on a CPU, where nf4 is decoded for each product.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..families import decoder_linears
from ..folder.loading import load_model
from ..folder.streaming import fill, open_files, place
from ..low_bit import check_low_bit, load_bitsandbytes
from ..settings import NF4_BLOCK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LowBitKind = Literal["nf4", "int8"]
OUTLIER = 6.0
"""Input columns with a larger value are multiplied in fp16 (the paper's threshold)."""


def quantized_model(
    path: str | Path, *, kind: LowBitKind, device: torch.device | str = "cpu", revision: str | None = None
) -> "PreTrainedModel":
    """A frozen causal language model with the linears of its decoder layers in nf4 or int8, the rest in bf16, in eval mode.

    Args:
        path: Model folder or hub id.
        kind: nf4 (0.5 bytes per weight and one fp32 scale per 64) or int8 (1 byte per weight and one fp32 scale per row).
        device: Device on which it is quantized and runs; it cannot move afterwards.
        revision: Hub revision.

    Raises:
        UserError: see ``load_model``; or bitsandbytes is missing or does not work on ``device``.
    """
    key = f"teacher.load_in: {kind}"
    # before the model is read, which may take minutes
    check_low_bit(key, device)
    _silence()
    with open_files(path, revision, torch.bfloat16) as (skeleton, files):
        model = skeleton if skeleton is not None else load_model(path, dtype=torch.bfloat16, revision=revision)
        linears = decoder_linears(model)
        if not linears:
            raise UserError(f"{key}: {path} has no linear layers in its decoder to quantize; use load_in: bf16")
        for name, linear in linears.items():
            # one linear at a time: bf16 from the file, quantized at once, then freed
            weight = linear.weight if files is None else files.read_as(f"{name}.weight", torch.bfloat16)
            # in place of the linear under the same name, so that nothing else of the model notices
            _replace(model, name, _rounded(key, name, linear, weight.detach(), kind, device))
        if files is not None:
            fill(model, files, dtype=torch.bfloat16, device=device)
        # buffers, and what a model that cannot be streamed has on the CPU
        place(model, device)
    return model.requires_grad_(False).eval()


def _rounded(key: str, name: str, linear: nn.Linear, weight: Tensor, kind: LowBitKind, device: torch.device | str) -> nn.Linear:
    """bitsandbytes' module for ``linear``, with its weight [out, in] quantized on ``device`` and its bias unchanged."""
    modules = load_bitsandbytes(key).nn
    shape = (linear.in_features, linear.out_features)
    try:
        if kind == "nf4":
            # scales stay fp32: rounding those too (compress_statistics) would save only 0.4 bits per weight
            module: Any = modules.Linear4bit(
                *shape, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4", device="meta"
            )
            # packed CPU kernels need a multiple of 32 outputs and exist only on some CPUs; decoding gives the same numbers on all
            module.support_avx512bf16_for_cpu = False
            module.weight = modules.Params4bit(
                weight, requires_grad=False, compress_statistics=False, quant_type="nf4", blocksize=NF4_BLOCK, module=module
            ).to(device)
        else:
            module = modules.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=OUTLIER, device="meta")
            # from the CPU: bitsandbytes quantizes when the parameter moves to its device
            module.weight = modules.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{key}: {name} {tuple(weight.shape)} cannot be quantized on {device} ({error}); use load_in: bf16") from error
    module.bias = linear.bias
    return module.eval()


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)


class _CastRemark(logging.Filter):
    """Drops bitsandbytes' message, at every int8 product, that bf16 inputs are cast to fp16."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "inputs will be cast" not in record.getMessage()


def _silence() -> None:
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    # once: each teacher of a process would add another filter
    if not any(isinstance(known, _CastRemark) for known in logger.filters):
        logger.addFilter(_CastRemark())
