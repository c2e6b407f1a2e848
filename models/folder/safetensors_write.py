"""Writing safetensors tensor by tensor: the library first copies all that goes into a file, which for a checkpoint is a second model.

Source of the format: https://github.com/huggingface/safetensors (section "Format").
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip


def write_safetensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` to the new file ``path``; no more than one of them is copied at a time.

    Args:
        path: A file that does not exist.
        tensors: Any devices and strides; float, integer and bool dtypes.
        metadata: Free-form text of the header.

    Raises: OSError when the disk refuses, FileExistsError when the file is there, KeyError for a dtype that has no name here.
    """
    import torch

    # wide dtypes first: every tensor then starts at a multiple of its width, as the library has it
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        dtype = _NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in ordered:
            if tensor.numel():
                own = tensor.detach().cpu().contiguous()
                file.write(own.reshape(-1).view(torch.uint8).numpy().data)
