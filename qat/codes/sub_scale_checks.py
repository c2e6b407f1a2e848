"""Checks of the sub-scales of super-blocks: dtypes, shapes, ranges."""

import torch
from torch import Tensor

from ..fake_quant.super_reference import SubScales
from ..spec import QuantSpec
from ..super_blocks import SuperBlock


def sub_problem(codes: Tensor, sub: SubScales | None, spec: QuantSpec) -> str | None:
    """Return why ``sub`` does not fit codes [out, in] of ``spec``; None if it does."""
    form = spec.super_block
    if (sub is not None) != (form is not None):
        return f"sub-scales are {'stored' if sub is not None else 'missing'}, kind is {spec.kind}"
    if sub is None or form is None:
        return None
    shape = (codes.shape[0], codes.shape[1] // form.width)
    problem = _integers("sub-scales", sub.scales, shape, form.least, max(form.most, -form.least - 1))
    return problem or _minimums_problem(sub, shape, form, spec.scale_shape(*codes.shape))


def _minimums_problem(sub: SubScales, shape: tuple[int, int], form: SuperBlock, blocks: tuple[int, int]) -> str | None:
    if not form.minimum:
        stored = sub.minimum is not None or sub.minimums is not None
        return "minimums are stored for a kind that has none" if stored else None
    if sub.minimum is None or sub.minimums is None:
        return "minimums are missing"
    if sub.minimum.dtype != torch.float32 or tuple(sub.minimum.shape) != blocks:
        return f"minimums' scales are {sub.minimum.dtype} of shape {tuple(sub.minimum.shape)}, not float32 of shape {blocks}"
    if not torch.equal(fp16_or_nan(sub.minimum), sub.minimum) or bool((sub.minimum < 0).any()):
        return "a minimum's scale is not an fp16 number of at least 0"
    return _integers("sub-minimums", sub.minimums, shape, 0, form.most)


def _integers(what: str, found: Tensor, shape: tuple[int, int], low: int, high: int) -> str | None:
    if found.dtype != torch.int8 or tuple(found.shape) != shape:
        return f"{what} are {found.dtype} of shape {tuple(found.shape)}, not int8 of shape {shape}"
    if found.numel() and not low <= int(found.min()) <= int(found.max()) <= high:
        return f"{what} span {int(found.min())}..{int(found.max())}, outside {low}..{high}"
    return None


def fp16_or_nan(numbers: Tensor) -> Tensor:
    """Return fp32 numbers as fp16 holds them; what is too large becomes NaN, which equals nothing."""
    held = numbers.to(torch.float16).to(torch.float32)
    return torch.where(torch.isfinite(held), held, torch.nan)
