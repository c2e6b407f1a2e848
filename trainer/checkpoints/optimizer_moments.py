"""Converts the moments of all optimizers to fp32 tensors and back.

torch keeps ``exp_avg`` and ``exp_avg_sq`` in fp32. bitsandbytes keeps one byte per element, an index into a table of 256 numbers, and the
largest magnitude per 256 elements; it keeps small tensors in fp32. These blocks depend on the sharding of a tensor over ranks, so a
checkpoint holds plain fp32 moments. If the sharding is the same again, loading finds scales and codes that decode to the same bits.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Elements of a moment that share a scale in bitsandbytes' 8-bit optimizers."""
_CHUNK = 4096  # blocks per step, about a million elements: limits the size of temporaries
# torch's name of a moment -> bitsandbytes' names of its codes, its table of 256 numbers, and its scales
_MOMENTS = {"exp_avg": ("state1", "qmap1", "absmax1"), "exp_avg_sq": ("state2", "qmap2", "absmax2")}


def load_state_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Sets the state of every parameter, in the form of ``parameter_state``; drops the optimizer's former state.

    Args:
        optimizer: Any kind of ``build_optimizer``, also another one than wrote the tensors.
        parameters: The optimizer's parameters by name; parameters without state in ``tensors`` start without state.
        tensors: By ``<parameter>.exp_avg``, ``.exp_avg_sq`` and ``.step``. Read one parameter at a time, so a mapping that reads from
            disk does not need memory for all of them.
    """
    optimizer.state.clear()
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in parameters.items():
        if f"{name}.step" in tensors and id(parameter) in stepped:
            set_parameter_state(optimizer, parameter, {key: tensors[f"{name}.{key}"] for key in ("step", *_MOMENTS)})


def parameter_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """``exp_avg``, ``exp_avg_sq`` (fp32, shaped as the parameter) and ``step`` (fp32 scalar) of a parameter; empty before its first step.

    8-bit moments are decoded on the CPU, because all of them in fp32 would not fit on their device. Others share the optimizer's memory.
    """
    state = optimizer.state.get(parameter, {})
    if not state:
        return {}
    found = {"step": torch.as_tensor(state["step"], dtype=torch.float32)}
    for key, (codes, table, scales) in _MOMENTS.items():
        # an 8-bit optimizer keeps small tensors in fp32, under the name of the codes: the dtype shows which it is
        moment = state[key] if key in state else state[codes]
        found[key] = moment if moment.dtype != torch.uint8 else decode_moments(moment, state[table], state[scales])
    return found


def set_parameter_state(optimizer: torch.optim.Optimizer, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
    """Sets step count and moments of one parameter."""
    if not _is_low_bit(optimizer):
        # copies: the optimizer updates its state in place, and what was read may be a view of a mapped checkpoint file
        moments = {key: state[key].to(parameter.device, parameter.dtype, copy=True) for key in _MOMENTS}
        # the step count stays on the CPU, where torch's AdamW keeps it unless it is fused or capturable
        optimizer.state[parameter] = {"step": state["step"].to("cpu", torch.float32, copy=True), **moments}
        return
    group, index = next((g, i) for g, i in _places(optimizer) if optimizer.param_groups[g]["params"][i] is parameter)
    # lets bitsandbytes decide about the precision and place of this parameter's state
    low_bit: Any = optimizer
    low_bit.init_state(optimizer.param_groups[group], parameter, group, index)
    own = optimizer.state[parameter]
    own["step"] = int(state["step"])
    for key, (codes, table, scales) in _MOMENTS.items():
        if own[codes].dtype == torch.uint8:
            encode_moments(state[key], own[table], codes=own[codes], scales=own[scales])
        else:
            own[codes].copy_(state[key])


@torch.no_grad()
def zero_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, mask: Tensor) -> None:
    """Sets the moments of removed weights to exact zeros, in place.

    Args:
        optimizer: Any kind of ``build_optimizer``.
        parameter: One of its parameters. Before its first step it has no moments, and nothing changes.
        mask: Bool, shape and device of the parameter; True = kept.
    """
    state = optimizer.state.get(parameter, {})
    for key, (codes, table, _) in _MOMENTS.items():
        moment = state.get(key, state.get(codes))
        if moment is None:
            continue
        if moment.dtype == torch.uint8:
            # paged moments are in memory that torch regards as the CPU's, so the mask must be there too; the code of 0 differs per table
            moment.masked_fill_(~mask.to(moment.device), int((state[table] == 0).nonzero()[0]))
        else:
            moment.mul_(mask)


@torch.no_grad()
def decode_moments(codes: Tensor, table: Tensor, scales: Tensor) -> Tensor:
    """``table[codes] * scale of the block``, as the optimizer's kernels decode it: fp32 on the CPU, in the shape of ``codes``.

    Args:
        codes: uint8; blocks of ``BLOCK`` run over the flattened tensor.
        table: fp32 [256].
        scales: fp32 [blocks].
    """
    table, scales = table.cpu(), scales.cpu()
    flat, decoded = codes.reshape(-1).cpu(), torch.empty(codes.numel(), dtype=torch.float32)
    for first in range(0, len(scales), _CHUNK):
        part = slice(first * BLOCK, (first + _CHUNK) * BLOCK)
        # int, because torch takes a uint8 index as a mask
        numbers = table[flat[part].int()]
        decoded[part] = numbers * scales[first : first + _CHUNK].repeat_interleave(BLOCK)[: len(numbers)]
    return decoded.reshape(codes.shape)


@torch.no_grad()
def encode_moments(moment: Tensor, table: Tensor, *, codes: Tensor, scales: Tensor) -> None:
    """Inverse of ``decode_moments``, into ``codes`` and ``scales``: exact for numbers decoded in the same blocks, else to nearest."""
    own, flat, target = table.to("cpu"), moment.detach().reshape(-1).to("cpu", torch.float32), codes.view(-1)
    for first in range(0, len(scales), _CHUNK):
        part = slice(first * BLOCK, (first + _CHUNK) * BLOCK)
        numbers = flat[part]
        # [blocks, BLOCK]; zeros fill up the last block, which change neither its largest magnitude nor the codes of its own elements
        rows = torch.nn.functional.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
        found, scale = _encode_blocks(rows, own)
        target[part].copy_(found.reshape(-1)[: len(numbers)])
        scales[first : first + _CHUNK].copy_(scale)


def _encode_blocks(rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [B, BLOCK] and scales [B]: per block the first candidate scale that reproduces every number, else its largest one."""
    # the table is ascending: the nearest entry is found by bisection among the middles between neighbours
    middles = (table[1:] + table[:-1]) / 2
    scale = rows.abs().amax(1)
    # first guess: the scale is the block's largest magnitude, as bitsandbytes computes it from fresh fp32 moments
    codes = _nearest(rows, scale, middles)
    exact = (table[codes.int()] * scale[:, None] == rows).all(1)
    # blocks that this does not reproduce were decoded from codes before: try the other scales that such a block may have had
    for candidate in _candidates(rows, table):
        if bool(exact.all()):
            break
        left = (~exact).nonzero()[:, 0]
        tried = _nearest(rows[left], candidate[left], middles)
        fits = (table[tried.int()] * candidate[left, None] == rows[left]).all(1)
        codes[left[fits]], scale[left[fits]], exact[left[fits]] = tried[fits], candidate[left[fits]], True
    return codes, scale


def _candidates(rows: Tensor, table: Tensor) -> list[Tensor]:
    """Scales [B] that a block may have had, other than its largest number.

    The number that determined the scale was coded as the table's first or last entry. The last entry is 1, so then the scale is the number.
    The first entry is not -1 but -0.993 (0 in tables without a sign), so for a negative number the scale is the number divided by it, up to
    the rounding of product and quotient.
    """
    lowest = float(table[0])
    if lowest >= 0:
        return []
    # the quotient may be off by a rounding in either direction, so two neighbours on each side are candidates too
    near = rows.amin(1) / lowest
    up, down = torch.full_like(near, torch.inf), torch.zeros_like(near)
    above, below = torch.nextafter(near, up), torch.nextafter(near, down)
    return [near, above, below, torch.nextafter(above, up), torch.nextafter(below, down)]


def _nearest(rows: Tensor, scale: Tensor, middles: Tensor) -> Tensor:
    # a block of zeros has scale 0: dividing by 1 gives the code of 0 instead of NaN
    return torch.bucketize(rows / torch.where(scale > 0, scale, 1.0)[:, None], middles).to(torch.uint8)


def _is_low_bit(optimizer: torch.optim.Optimizer) -> bool:
    return hasattr(optimizer, "name2qmap")


def _places(optimizer: torch.optim.Optimizer) -> list[tuple[int, int]]:
    return [(g, i) for g, group in enumerate(optimizer.param_groups) for i in range(len(group["params"]))]
