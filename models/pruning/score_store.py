"""The folder in which scores of one model on one text are kept: each part is written whole, with a checksum, or is not there."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.files import check_free_space, write_bytes_atomic, write_json_atomic
from ..common.seal import SEAL, seal_is_broken, sealed

FORMAT = 2
"""Increased when the same model and text give other scores: part of the folder's name."""


class ScoreStore:
    """Named parts, of tensors or of plain numbers. A damaged part counts as missing, and is made again."""

    def __init__(self, folder: Path | None = None) -> None:
        """Nothing is written before the first part.

        Args:
            folder: The folder, which need not exist; None keeps the parts in memory alone.
        """
        self.folder = folder
        self._held: dict[str, Any] = {}
        self.written = 0
        """Parts that this object has written."""

    def has(self, part: str) -> bool:
        """Whether the part is there, undamaged."""
        return self.tensors(part) is not None

    def tensors(self, part: str) -> dict[str, Tensor] | None:
        """The tensors of a part, on the CPU; None if it is missing or damaged."""
        if self.folder is None:
            return self._held.get(part)
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            content = (self.folder / f"{part}.safetensors").read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            found = load(content)
            if header["__metadata__"]["sha256"] != _hash(found):
                return None
        # what a missing or damaged file raises: it is made again
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
            return None
        return found

    def put(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes a part in one step.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        self.written += 1
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if self.folder is None:
            self._held[part] = held
            return
        from safetensors.torch import save

        check_free_space(self.folder, sum(tensor.nbytes for tensor in held.values()), f"the score cache {self.folder}")
        write_bytes_atomic(self.folder / f"{part}.safetensors", save(held, metadata={"sha256": _hash(held)}))

    def numbers(self, part: str) -> dict[str, Any]:
        """Plain data of a part; {} if it is missing or damaged."""
        if self.folder is None:
            return self._held.get(part, {})
        try:
            found = json.loads((self.folder / f"{part}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        # no other writer: without a seal it is not of this class
        if not isinstance(found, dict) or SEAL not in found or seal_is_broken(found):
            return {}
        del found[SEAL]
        return found

    def put_numbers(self, part: str, content: Mapping[str, Any]) -> None:
        """Replaces the plain data of a part in one step; its keys are text."""
        self.written += 1
        if self.folder is None:
            self._held[part] = dict(content)
        else:
            write_json_atomic(self.folder / f"{part}.json", sealed(content))


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
