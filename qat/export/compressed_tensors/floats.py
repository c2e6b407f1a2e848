"""Codes and scales of floats as bytes: float-quantized, mxfp4-pack-quantized and nvfp4-pack-quantized.

    float-quantized         weight float8 e4m3 [out, in]; weight_scale bf16 [out, 1]; w = weight * scale
    mxfp4-pack-quantized    weight_packed uint8 [out, in / 2]; weight_scale uint8 [out, in / 32], the exponent e + 127 (e8m0); w = q * 2^e
    nvfp4-pack-quantized    weight_packed as above; weight_scale float8 e4m3 [out, in / 16]; weight_global_scale fp32 [1];
                            w = q * (weight_scale / weight_global_scale)

A byte holds two codes of 4 bits, the one of the even input in the lower half: sign in bit 3, magnitude 0, .5, 1, 1.5, 2, 3, 4, 6 in the
others. Scales lie in plain rows: kernels swizzle them when they load. A scale of the whole matrix (fp8) is stored for each row: servers
that join matrices with one scale each into one would round their codes again.

Source: compressed-tensors ``compressors/naive_quantized``, ``compressors/nvfp4``, ``compressors/mxfp4``, ``compressors/mx_utils.py``; OCP
Microscaling Formats v1.0, sections 5.3 and 5.4.
"""

import torch
from torch import Tensor

from ....models.common.errors import UserError
from ....models.fused_linears import joined
from ...source.quantized_source import ExportSource


def pack_pairs(codes: Tensor) -> Tensor:
    """Pack codes of 4 bits, uint8 [out, in] in 0..15, into bytes: uint8 [out, in / 2]; ValueError for an odd width or another code."""
    if codes.shape[1] % 2 or (codes.numel() and int(codes.max()) > 15):
        raise ValueError(f"codes of shape {tuple(codes.shape)} up to {int(codes.max())} do not fill bytes of two 4-bit codes")
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def exponent_bytes(scales: Tensor) -> Tensor:
    """Return powers of two from 2^-127 to 2^127, fp32, as e8m0 bytes: uint8 of the same shape; ValueError for another number."""
    # the exponent field of fp32 has the same bias, and is 0 for 2^-127, which is subnormal
    found = (scales.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    if not torch.equal(torch.exp2(found.double() - 127), scales.double()):
        raise ValueError("a scale is not a power of two from 2^-127 to 2^127")
    return found


def e4m3_scales(scales: Tensor) -> Tensor:
    """Return fp32 values of e4m3 as float8 of the same shape; ValueError if one is not such a value."""
    stored = scales.to(torch.float8_e4m3fn)
    if not torch.equal(stored.to(torch.float32), scales):
        raise ValueError("a scale is not a number of float8 e4m3")
    return stored.contiguous()


def check_global_scales(source: ExportSource) -> None:
    """Refuse nvfp4 parts of a matrix that servers join, if their global scales differ.

    Raises:
        UserError: servers would use one of the scales for all parts, and compute another model.
    """
    scales = source.state.global_scales
    for names in joined(scales):
        if any(not torch.equal(scales[name], scales[names[0]]) for name in names):
            raise UserError(
                f"servers make one matrix of {', '.join(names)} with one global scale, and theirs differ; quantize the model again: "
                "parts of one matrix then share it"
            )
