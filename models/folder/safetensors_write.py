"""Writes safetensors tensor by tensor. The library first copies everything that goes into a file, which is a second model in memory.

Source of the format: https://github.com/huggingface/safetensors (section "Format").
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {
    "int64": "I64", "float64": "F64", "float32": "F32", "int32": "I32", "bfloat16": "BF16", "float16": "F16",
    "int16": "I16", "float8_e4m3fn": "F8_E4M3", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""torch's dtypes -> the format's, in the order in which the library writes them: wide ones first, so that every tensor is aligned."""
Planned = tuple[str, tuple[int, ...]]
"""(dtype without 'torch.', shape) of a tensor that is still to be made."""


def write_safetensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` to the new file ``path``. The bytes equal those of the library; at most one tensor is copied at a time.

    Args:
        path: File that does not exist yet.
        tensors: Tensors on any device with any strides; float, integer and bool dtypes.
        metadata: Free-form text of the header.

    Raises:
        OSError: the disk refuses.
        FileExistsError: the file exists.
        KeyError: a dtype has no name in the format.
    """
    planned = {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_planned(path, planned, lambda name: tensors[name], metadata)


def write_planned(
    path: Path, planned: Mapping[str, Planned], make: "Callable[[str], Tensor]", metadata: Mapping[str, str] | None = None
) -> None:
    """``write_safetensors`` for tensors that are made when they are written, so that only one is in memory.

    Args:
        path: File that does not exist yet.
        planned: Name -> (dtype without 'torch.', shape).
        make: Returns the tensor of a name, in its dtype and shape.
        metadata: Free-form text of the header.

    Raises:
        OSError: the disk refuses.
        FileExistsError: the file exists.
        KeyError: a dtype has no name in the format.
        ValueError: a tensor has another dtype or shape than planned.
    """
    import torch

    places = {dtype: place for place, dtype in enumerate(_NAMES)}
    # by dtype, then by name, as the library does
    ordered = sorted(planned, key=lambda name: (places[planned[name][0]], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in ordered:
        dtype, shape = planned[name]
        # offsets count from the start of the data
        end = offset + math.prod(shape) * getattr(torch, dtype).itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # data begins at a multiple of 8 bytes, so that readers can map tensors
    text += b" " * (-len(text) % 8)
    # x: an existing file is never overwritten
    with Path(path).open("xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in ordered:
            tensor = make(name)
            # the header is written already, so a tensor of another size would damage the file
            if (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) != planned[name]:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned was {planned[name]}")
            # an empty tensor has no bytes
            if tensor.numel():
                # as bytes: numpy has no bf16
                own = tensor.detach().cpu().contiguous()
                file.write(own.reshape(-1).view(torch.uint8).numpy().data)
