"""A GGUF file, or a model in several, as the weights of a transformers model: names, shapes and values, one tensor in memory at a time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UserError
from .block_types import FLOATS
from .container import GgufFile, GgufTensor, read_gguf
from .fields import Fields
from .hyperparameters import config_fields, expert_count
from .names import Change, origin_of
from .parts import part_files
from .rope import ROPE_TENSORS
from .unpack import check_installed, known_types, unpack

_FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 2**22
"""Most elements that are unpacked at once."""


@dataclass(frozen=True)
class GgufWeight:
    """A tensor of transformers' files and its place in the GGUF file."""

    name: str
    """Name in transformers' files."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Dtype that holds the stored values exactly: that of plain floats, fp32 for blocks."""
    tensor: GgufTensor
    change: Change
    expert: int = 0
    """Index in a stack of experts."""


class GgufSource:
    """An opened GGUF file, or the first part of a model; headers are checked, no tensor is read yet."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if a file is damaged or missing, or of an architecture or with tensors that decoct does not know."""
        self.file: GgufFile = read_gguf(path)
        """The file with the metadata."""
        self.fields = Fields(self.file)
        self.files: list[GgufFile] = self._parts()
        """All parts, in order."""
        # the file of each tensor, by the tensor's name
        self._places = {name: file for file in self.files for name in file.tensors}
        self.config: dict[str, Any] = config_fields(self.fields)
        """Fields of config.json."""
        self.weights: list[GgufWeight] = []
        """Tensors of transformers' files, in the order of the GGUF file."""
        for tensor in (tensor for file in self.files for tensor in file.tensors.values()):
            # rotary divisors are part of the config, no weights
            if tensor.name not in ROPE_TENSORS:
                self.weights += self._weights_of(tensor)

    def _parts(self) -> list[GgufFile]:
        count = self.fields.whole("split.count", 1, least=0)
        if count <= 1:
            return [self.file]
        paths = part_files(self.file.path)
        if len(paths) != count:
            raise UserError(
                f"{self.file.path} is one of {count} parts of a model, which its name does not say; name the parts "
                f"NAME-00001-of-{count:05d}.gguf and so on, or join them (llama-gguf-split --merge)"
            )
        files = [self.file, *map(read_gguf, paths[1:])]
        for number, file in enumerate(files):
            told = (file.metadata.get("split.no"), file.metadata.get("split.count"))
            if told != (number, count):
                raise UserError(f"{file.path} is not part {number + 1} of {count} of this model, as its name says; fetch the parts again")
        names = [name for file in files for name in file.tensors]
        if (wanted := self.fields.whole("split.tensors.count", len(names), least=0)) != len(names) or len(set(names)) != len(names):
            raise UserError(
                f"{self.file.path}: its {count} parts have {len(set(names)):,} different tensors in {len(names):,}, where the model has "
                f"{wanted:,}; the parts are of different models: fetch them again"
            )
        return files

    def types(self) -> dict[str, int]:
        """Name of each storage type -> number of its tensors, in the order of their appearance."""
        found: dict[str, int] = {}
        for file in self.files:
            for name, count in file.types().items():
                found[name] = found.get(name, 0) + count
        return found

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return int(self.config["vocab_size"])

    def _weights_of(self, tensor: GgufTensor) -> list[GgufWeight]:
        # integers and ggml's types for intermediate results (Q8_1, Q8_K) hold no weights
        if tensor.type.name not in known_types():
            where, kind = self._places[tensor.name].path, tensor.type.name
            raise UserError(f"{where}: {tensor.name} is of type {kind}, which holds no weights that can be unpacked")
        try:
            origin = origin_of(tensor.name, self.config["model_type"], expert_count(self.fields))
        except UserError as error:
            raise UserError(f"{self.file.path}: {error}; decoct cannot import this model") from error
        dtype = _FLOAT_DTYPES.get(tensor.type.name, torch.float32)
        # 1 + w may need more bits than w: the difference is exact only in fp32
        if origin.change == "plus_one":
            dtype = torch.float32
        shape = tensor.shape
        if origin.change == "experts":
            if len(shape) != 3 or shape[0] != len(origin.names):
                raise UserError(f"{self.file.path}: {tensor.name} has shape {shape}; expected {len(origin.names)} experts of matrices")
            return [GgufWeight(name, shape[1:], dtype, tensor, "experts", index) for index, name in enumerate(origin.names)]
        if origin.change == "transpose":
            # Conv1D: transformers' shape is the other way round
            shape = shape[::-1]
        if origin.change == "row" and len(shape) == 1:
            shape = (1, *shape)
        return [GgufWeight(origin.names[0], shape, dtype, tensor, origin.change)]

    def check_types(self) -> None:
        """Raise UserError if a block type needs a package that is not installed."""
        for name in self.types():
            check_installed(name)

    def read(self, weight: GgufWeight) -> Tensor:
        """The values of a tensor in ``weight.dtype``, as transformers stores them.

        Raises:
            UserError: a value is not finite, or the file was cut off while it was read.
        """
        tensor = weight.tensor
        # an expert is a run of rows in the stack
        matrix = math.prod(tensor.shape[1:-1]) if weight.change == "experts" else tensor.rows
        first = weight.expert * matrix
        values = self._values(tensor, first, first + matrix)
        # one check for all: every value passes here on its way to the disk or a GPU
        if not bool(values.isfinite().all()):
            where = self._places[tensor.name].path
            raise UserError(f"{where}: {tensor.name} holds NaN or infinite numbers; the file is damaged: fetch or convert it again")
        return self._undone(weight, values.reshape(tensor.shape[1:] if weight.change == "experts" else tensor.shape)).to(weight.dtype)

    def _values(self, tensor: GgufTensor, begin: int, end: int) -> Tensor:
        """Rows of a tensor: [rows, columns], fp32 for blocks."""
        columns = tensor.shape[-1]
        out = torch.empty(end - begin, columns, dtype=_FLOAT_DTYPES.get(tensor.type.name, torch.float32))
        # in pieces, since unpacking takes several times the bytes of the block
        step = max(1, _PIECE // columns)
        for at in range(begin, end, step):
            until = min(at + step, end)
            blocks = self._places[tensor.name].row_blocks(tensor, at, until)
            if tensor.type.name in FLOATS:
                # the bits as they are: numpy has no bf16
                rows = torch.from_numpy(blocks.reshape(-1)).view(out.dtype).reshape(until - at, columns)
            else:
                rows = torch.from_numpy(unpack(tensor.type.name, blocks.reshape(-1, tensor.type.nbytes)).reshape(until - at, columns))
            out[at - begin : until - begin] = rows
        return out

    def _undone(self, weight: GgufWeight, values: Tensor) -> Tensor:
        """The values before llama.cpp's converter changed them."""
        if weight.change in ("pair_q", "pair_k"):
            heads = self.config["num_attention_heads" if weight.change == "pair_q" else "num_key_value_heads"]
            rows = values.shape[0]
            if rows % (2 * heads):
                raise UserError(f"{self.file.path}: {weight.tensor.name} has {rows:,} rows, no even number for each of {heads} heads")
            # a head's rows are pairs in the file; transformers wants the first halves of all pairs, then the second
            return values.reshape(heads, rows // heads // 2, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape).contiguous()
        # in fp32, where the difference is exact
        if weight.change == "plus_one":
            return values.float() - 1
        if weight.change == "transpose":
            return values.T.contiguous()
        return values.reshape(weight.shape)

    def facts(self, hashes: Sequence[str]) -> dict[str, Any]:
        """Where the weights come from, for the record: format, name and sha256 of each file, and the tensors by type."""
        texts = {name: self.fields.text(f"general.{name}", None) for name in ("name", "license")}
        return {
            "format": "gguf",
            "file": self.file.path.name,
            "sha256": hashes[0],
            **({"parts": {file.path.name: sha256 for file, sha256 in zip(self.files, hashes)}} if len(self.files) > 1 else {}),
            "bytes": sum(file.size for file in self.files),
            "architecture": self.fields.architecture,
            **{name: text for name, text in texts.items() if text},
            "types": self.types(),
        }
