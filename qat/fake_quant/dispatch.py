"""Chooses the implementation, Triton kernels on CUDA and the reference elsewhere, and has the checks that all ops share."""

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from ..spec import QuantSpec

Backend = Literal["auto", "reference", "triton"]
# fp64 has no kernel: the reference computes it on every device
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# find_spec imports nothing, so machines without a GPU never load triton
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def use_kernel(tensor: Tensor, backend: str, dtypes: tuple[torch.dtype, ...] = _KERNEL_DTYPES) -> bool:
    """Whether ``backend`` means the Triton kernels, which take ``dtypes``, for this tensor.

    Raises:
        ValueError: the name is unknown, or an explicit 'triton' cannot run because package, dtype or device do not fit.
    """
    if backend == "auto":
        return tensor.is_cuda and tensor.dtype in dtypes and _TRITON_INSTALLED
    if backend not in ("reference", "triton"):
        raise ValueError(f"backend={backend!r} is not one of auto, reference, triton")
    if backend == "triton":
        _check_triton(tensor, dtypes)
    return backend == "triton"


def _check_triton(tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not _TRITON_INSTALLED:
        raise ValueError("backend='triton' needs the triton package; install it or use backend='auto'")
    if tensor.dtype not in dtypes:
        raise ValueError(f"backend='triton' takes float32, bfloat16 or float16, not {tensor.dtype}; use backend='auto'")
    # imported last, because it loads triton
    from .common_kernel import runs_on

    if not runs_on(tensor.device):
        raise ValueError(
            f"backend='triton' cannot run on device {tensor.device}; use backend='auto', or set TRITON_INTERPRET=1 "
            "before triton is first imported to run the kernels in its interpreter on a CPU"
        )


def check_weight(weight: Tensor, mask: Tensor | None) -> None:
    """Raises ValueError if ``weight`` is not a floating point matrix, or ``mask`` not bool of its shape on its device."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a floating point matrix [out, in], not {weight.dtype} of shape {tuple(weight.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape or mask.device != weight.device):
        raise ValueError(
            f"mask must be bool of shape {tuple(weight.shape)} on {weight.device}, True where a weight is kept; "
            f"got {mask.dtype} of shape {tuple(mask.shape)} on {mask.device}"
        )


def grid_numbers(spec: QuantSpec) -> list[float]:
    """[dropped mantissa bits, smallest, largest] of the spec's scale grid, in the form that the ops take."""
    return [float(spec.grid.dropped_bits), spec.grid.smallest, spec.grid.largest]
