"""Reads a GGUF file as the model it was made from: transformers' names and layout, in fp32.

It is the inverse of ``export/gguf/names.py``, deliberately written independently: llama.cpp's pairs of a head's channels become halves
again, Gemma's 1 + w becomes w, GPT-2's matrices are transposed.

Source: transformers ``modeling_{llama,qwen2,qwen3,gemma,gemma2,gemma3,gpt2}.py``; llama.cpp ``llama-arch.cpp``.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.common.errors import UserError
from .gguf_file import GgufFile, read_gguf
from .tensors import Decoded

FILE = "model.gguf"
EXTRA = ("rope_freqs.weight",)
"""Tensors that are not weights of the transformers model."""
_LLAMA_LIKE = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_GEMMA_TWO = {
    **_LLAMA_LIKE,
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2 = {
    "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OUTER_GPT2 = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f", "output": "lm_head",
}  # fmt: skip
_TABLES = {
    "llama": (_OUTER, _LLAMA_LIKE, "model.layers"),
    "qwen2": (_OUTER, _LLAMA_LIKE, "model.layers"),
    "qwen3": (_OUTER, _LLAMA_LIKE, "model.layers"),
    "gemma": (_OUTER, _LLAMA_LIKE, "model.layers"),
    "gemma2": (_OUTER, _GEMMA_TWO, "model.layers"),
    "gemma3": (_OUTER, _GEMMA_TWO, "model.layers"),
    "gpt2": (_OUTER_GPT2, _GPT2, "transformer.h"),
}
_PACKED = ("Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4")


def find_gguf(path: Path) -> Path | None:
    """The GGUF file ``path``, or the one in the folder ``path``; None if there is none.

    Raises:
        UserError: the folder has several files (a model in parts is not read).
    """
    path = Path(path)
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    # a folder with safetensors too is a plain model folder
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not any(path.glob("*.safetensors")) else []
    if len(files) > 1:
        raise UserError(f"{path} has {len(files)} GGUF files ({files[0].name}, {files[1].name}, ...); name the one that is meant")
    return files[0] if files else None


class GgufModel:
    """An opened file under transformers' names. Every access reads the file again; nothing is kept in memory."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file is damaged or foreign, has an unknown architecture, or unknown tensors."""
        found = find_gguf(Path(path))
        if found is None:
            raise UserError(f"{path} is not a GGUF file and contains none; give a .gguf file, or a folder with one")
        self.file: GgufFile = read_gguf(found)
        self.path = found
        self.architecture = self._entry("general.architecture", str)
        if self.architecture not in _TABLES:
            raise UserError(
                f"{found}: the architecture {self.architecture!r:.100} is unknown to this reader; it knows {', '.join(_TABLES)}"
            )
        self._stored = {self._original(name): name for name in self.file.tensors if name not in EXTRA}
        self.modules = tuple(
            name.removesuffix(".weight") for name, stored in self._stored.items() if self.file.tensors[stored].type in _PACKED
        )
        """Names of the modules whose weights are blocks of codes, in file order."""
        self.scheme: dict[str, str] = {name: self.file.tensors[stored].type for name, stored in self._stored.items()}
        """Name -> stored type, as in ``GgufTensor.type``."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the state dict, without a tied head."""
        shapes = {name: self.file.tensors[stored].shape for name, stored in self._stored.items()}
        # transformers' shapes: GPT-2's Conv1D stores [in, out], the file [out, in]
        return {name: shape[::-1] if self._turned(name) else shape for name, shape in shapes.items()}

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The fp32 tensor ``name`` in transformers' layout; UserError as ``GgufFile.read``."""
        return self._as_ours(name, self.file.read(self._stored[name]))

    def _as_ours(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        values = self._in_halves(name, values)
        if self.architecture.startswith("gemma") and "norm" in name:
            # the file has 1 + w, because llama.cpp multiplies norms by the stored value
            return values - np.float32(1)
        # GPT-2: [out, in] -> Conv1D's [in, out]
        return np.ascontiguousarray(values.T) if self._turned(name) else values

    def as_stored(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The result of ``tensor`` for ``values``: Gemma's norms are stored as 1 + w, whose rounding loses digits of w."""
        if self.architecture.startswith("gemma") and "norm" in name:
            return (values + np.float32(1)) - np.float32(1)
        return values

    def decode(self, module: str) -> Decoded:
        """A module: its weight as ``tensor`` gives it; codes and scales as ``GgufFile.decode`` does, rows in transformers' order."""
        name = f"{module}.weight"
        weight, codes, scales = self.file.decode(self._stored[name])
        return Decoded(self._as_ours(name, weight), self._in_halves(name, codes), self._in_halves(name, scales))

    def number(self, key: str) -> Any:
        """The metadata entry ``<architecture>.<key>``; None if it is missing."""
        return self.file.metadata.get(f"{self.architecture}.{key}")

    def _entry(self, key: str, kind: type) -> Any:
        value = self.file.metadata.get(key)
        if type(value) is not kind:
            raise UserError(f"{self.path}: {key} is missing from the metadata or is no {kind.__name__}; export again")
        return value

    def _original(self, stored: str) -> str:
        outer, inner, layers = _TABLES[self.architecture]
        match = re.fullmatch(r"(?:blk\.(\d{1,5})\.)?([a-z_0-9]+)\.(weight|bias)", stored)
        # ``blk.7.`` selects the table of the layers
        known = (inner if match.group(1) else outer).get(match.group(2)) if match else None
        if match is None or known is None:
            raise UserError(f"{self.path}: the tensor {stored!r:.200} belongs to no {self.architecture} model that this reader knows")
        place = f"{layers}.{int(match.group(1))}.{known}" if match.group(1) else known
        return f"{place}.{match.group(3)}"

    def _turned(self, name: str) -> bool:
        return self.architecture == "gpt2" and name.endswith(".weight") and (".attn.c_" in name or ".mlp.c_" in name)

    def _in_halves(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        """Reorders the rows of q and k: adjacent pairs of a head's channels become its first and second half."""
        queries, keys = ".self_attn.q_proj." in name, ".self_attn.k_proj." in name
        if self.architecture != "llama" or not (queries or keys):
            return values
        # without its own entry there are as many heads of keys as of queries
        heads = self.number("attention.head_count" if queries else "attention.head_count_kv") or self.number("attention.head_count")
        rows = values.shape[0]
        if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
            raise UserError(f"{self.path}: {name} has {rows} rows, which {heads!r:.50} attention heads do not divide into pairs")
        # llama.cpp rotates adjacent channels, transformers channel i with channel i + half
        pairs = np.arange(rows).reshape(heads, rows // heads // 2, 2)
        # [heads, half, 2] -> [heads, 2, half] -> [rows]
        return values[pairs.transpose(0, 2, 1).reshape(-1)]
