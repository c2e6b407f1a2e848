"""What an axis map is: which dimension of which tensor is cut with which axis of the shape. ``family_map`` has the maps.

An entry has one word per dimension of the tensor. ``hidden``, ``ffn``, ``heads`` (of queries) and ``kv_heads`` (of keys and values) are
axes; a head is ``head_dim`` consecutive rows or columns. ``heads+kv_heads+kv_heads`` is a fused tensor with the three parts one after the
other, and '' is a dimension that is never cut. The file imports no torch, because plans ask it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from .common.errors import UserError

if TYPE_CHECKING:
    from torch import nn

Axis = Literal["ffn", "heads", "kv_heads", "hidden", "layers"]
AXES: tuple[Axis, ...] = ("ffn", "heads", "kv_heads", "hidden", "layers")
"""The axes of a shape, in the order in which messages and records name them."""
WIDTHS: tuple[Axis, ...] = ("ffn", "heads", "kv_heads", "hidden")
"""The axes along which tensors are cut; ``layers`` removes whole ones."""
Entries = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """The axis map of one ``model_type``, and what its code and config demand of a shape."""

    name: str
    """transformers ``model_type``."""
    layers_path: str = "model.layers"
    """The ModuleList of decoder layers, relative to the model."""
    layer: Entries
    """Tensors of one decoder layer, by their name inside it."""
    outside: Entries
    """Tensors outside the decoder layers."""
    fields: Mapping[Axis, str]
    """Axis -> config field with its size. Without ``kv_heads`` every query head has its own keys and values."""
    attention: str = "self_attn"
    """The attention of a layer, and by its name the record of kept heads."""
    attention_out: str = "self_attn.o_proj"
    """The matrix whose inputs are the outputs of the heads."""
    ffn: str = "mlp"
    """The FFN of a layer, and by its name the record of kept channels."""
    ffn_out: str = "mlp.down_proj"
    """The matrix whose inputs are the FFN channels."""
    embedding: str = "model.embed_tokens"
    """The table of tokens."""
    final_norm: str = "model.norm"
    """The norm before the head."""
    rms_norms: tuple[str, ...]
    """RMSNorms of a layer whose mean is over a cut axis; the final norm is one too, unless ``layer_norm``."""
    norms_before: Mapping[str, str] = field(default_factory=dict)
    """Place of ``readers`` -> the norm whose output it reads. Without an entry it reads the residual stream itself."""
    norms_before_field: str | None = None
    """Config field that must be true for ``norms_before`` (OPT: some of its models normalise behind each block); None: always."""
    value: str = "self_attn.v_proj"
    """The matrix of which the outputs, or their last part, are the values of attention."""
    ffn_in: str | None = "mlp.up_proj"
    """The matrix of which the outputs, or their last part, enter ``ffn_out`` as a factor, so that a scale of them passes through; None: a
    nonlinearity stands between."""
    ffn_relu: str | None = None
    """Config field that must be 'relu' for ``ffn_in``: its nonlinearity passes positive scales through; None: there is none."""
    layer_norm: bool = False
    """The norms are LayerNorms: their mean and variance change when channels are removed, and no factor undoes that."""
    norm_offset: float = 0.0
    """Added to an RMSNorm's weight by the family's code (Gemma: 1)."""
    scaled_embedding: bool = False
    """The family's code multiplies embeddings by sqrt(hidden)."""
    own_head_dim: bool = True
    """The family's code reads ``head_dim`` from the config; otherwise it is hidden / heads."""
    whole_heads: bool = False
    """transformers refuses a hidden size that is no multiple of the query heads, whatever ``head_dim`` is."""
    vllm_head_dim: bool = True
    """vLLM's own class of the family reads ``head_dim`` from the config (vLLM 0.33)."""

    @property
    def ffn_field(self) -> str:
        """Config field with the number of FFN channels."""
        return self.fields["ffn"]

    @property
    def depth_field(self) -> str:
        """Config field with the number of decoder layers."""
        return self.fields["layers"]

    @cached_property
    def matrices(self) -> dict[str, tuple[str, str]]:
        """Matrix of a layer -> (axes of its outputs, axes of its inputs)."""
        biases = {name.removesuffix(".bias"): entry[0] for name, entry in self.layer.items() if name.endswith(".bias")}
        found: dict[str, tuple[str, str]] = {}
        for name, entry in self.layer.items():
            if len(entry) == 2:
                module = name.removesuffix(".weight")
                # [out, in], or [in, out] of a Conv1D: the bias is along the outputs
                found[module] = (entry[0], entry[1]) if biases[module] == entry[0] else (entry[1], entry[0])
        return found

    def readers(self) -> dict[str, list[str]]:
        """Places of a layer that read the hidden states -> the matrices that read them there: attention first, then FFN."""
        found: dict[str, list[str]] = {}
        for module, (_, inner) in self.matrices.items():
            if inner == "hidden":
                found.setdefault(module.split(".")[0], []).append(module)
        return found

    def layers(self, model: "nn.Module") -> "nn.ModuleList":
        """The decoder layers, in order."""
        from torch import nn

        layers = model.get_submodule(self.layers_path)
        assert isinstance(layers, nn.ModuleList), f"{self.layers_path} of {self.name} is a {type(layers).__name__}"
        return layers

    def place(self, name: str) -> tuple[int | None, str]:
        """(layer, name inside it) of a module or tensor; (None, name) outside the layers."""
        match = re.fullmatch(re.escape(self.layers_path) + r"\.(\d+)\.(.+)", name)
        return (None, name) if match is None else (int(match[1]), match[2])

    def entry(self, name: str) -> tuple[str, ...] | None:
        """The axes of a tensor's dimensions, by its full name; None if the map does not have it."""
        layer, inner = self.place(name)
        return (self.outside if layer is None else self.layer).get(inner)

    def missing(self, tensors: Iterable[str]) -> list[str]:
        """Tensors without an entry, each once for all layers: 'model.layers.*.self_attn.sinks'."""
        return list(dict.fromkeys(any_layer(name) for name in tensors if self.entry(name) is None))

    def cuts(self, tensor: str, axes: Iterable[Axis]) -> bool:
        """Whether a tensor has a dimension along one of these axes (``layers`` cuts whole layers and no tensor)."""
        parts = {part for dimension in self.entry(tensor) or () for part in dimension.split("+")}
        return not parts.isdisjoint(axes)

    def cut_share(self, matrices: Mapping[str, int], kept: Iterable[Axis]) -> float:
        """Share of the weights inside decoder layers in matrices that a cut along these axes makes smaller or removes.

        Args:
            matrices: Full name of each matrix of the model -> its elements.
            kept: The axes. Fewer key/value heads have fewer query heads too.
        """
        axes = set(kept)
        inside = {name: count for name, count in matrices.items() if self.place(name)[0] is not None}
        if "layers" in axes:
            return 1.0
        wanted = axes | ({"heads"} if "kv_heads" in axes else set())
        return sum(count for name, count in inside.items() if self.cuts(name, wanted)) / max(1, sum(inside.values()))

    def renumbered(self, name: str, kept: Sequence[int]) -> str | None:
        """Name of a module or tensor in a student that has the layers ``kept`` of this model; None when its layer was dropped."""
        # "model.layers.3.mlp.up_proj" -> layer 3 and the rest; names outside the layers stay
        index, inner = self.place(name)
        if index is None:
            return name
        return f"{self.layers_path}.{kept.index(index)}.{inner}" if index in kept else None

    def source(self, name: str, kept: Sequence[int]) -> str:
        """Name in this model of a module or tensor of a student that has its layers ``kept``: the inverse of ``renumbered``."""
        index, inner = self.place(name)
        return name if index is None else f"{self.layers_path}.{kept[index]}.{inner}"


def any_layer(name: str) -> str:
    """A tensor's name without the number of its layer: 'model.layers.*.mlp.up_proj.weight'."""
    return re.sub(r"\.\d+\.", ".*.", name)


def check_map(family: Family, tensors: Iterable[str]) -> None:
    """Raises UserError, listing them, if a model of the family has tensors that the map does not have."""
    if missing := family.missing(tensors):
        raise UserError(
            f"this model of type {family.name!r} cannot be cut: decoct's axis map does not have its tensors {', '.join(missing)}"
        )
