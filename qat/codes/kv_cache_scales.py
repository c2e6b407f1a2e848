"""Rounding of keys and values as stored in a quantized folder; part of ``QuantState``.

``quant/codes.safetensors`` has ``<attention module>.k_scale`` and ``.v_scale`` fp32, and for an asymmetric spec ``.k_zero`` and
``.v_zero`` int8, one number each, if scaling is static; ``decoct.json`` names the spec and the attention modules.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..spec import ActivationSpec

PARTS = ("k", "v")
_SCALE, _ZERO = "_scale", "_zero"


@dataclass(frozen=True, kw_only=True)
class CacheState:
    """The spec of keys and values with its stored scales, on the CPU."""

    spec: ActivationSpec
    attentions: tuple[str, ...]
    """Full names of the attention modules, in module order."""
    scales: dict[str, Tensor] = field(default_factory=dict)
    """fp32 [] by ``<attention module>.k`` and ``.v``; empty for dynamic scaling."""
    zeros: dict[str, Tensor] = field(default_factory=dict)
    """int8 [] by the same names; empty unless stored and asymmetric."""

    @property
    def names(self) -> list[str]:
        """Return ``<attention module>.k`` and ``.v`` for each attention module."""
        return [f"{attention}.{part}" for attention in self.attentions for part in PARTS]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors for ``quant/codes.safetensors``."""
        return {
            name + suffix: held[name].contiguous()
            for name in self.names
            for suffix, held in ((_SCALE, self.scales), (_ZERO, self.zeros))
            if name in held
        }

    def renamed(self, names: Mapping[str, str]) -> "CacheState":
        """Return the state with renamed attention modules; ``names`` has the new names of modules, such as of their linears."""
        new = {attention: _new_name(attention, names) for attention in self.attentions}

        def of(held: dict[str, Tensor]) -> dict[str, Tensor]:
            return {new[name.rpartition(".")[0]] + name[name.rindex(".") :]: value for name, value in held.items()}

        return replace(self, attentions=tuple(new.values()), scales=of(self.scales), zeros=of(self.zeros))

    def record(self) -> dict[str, Any]:
        """Return the part of the ``quant`` entry of ``decoct.json``."""
        return {"kv_cache": self.spec.to_json(), "attentions": list(self.attentions)}

    def expected(self) -> Iterator[str]:
        """Yield the names of the tensors that the spec needs in ``quant/codes.safetensors``."""
        if self.spec.scaling == "static":
            for name in self.names:
                yield name + _SCALE
                if not self.spec.symmetric:
                    yield name + _ZERO

    def problem(self) -> str | None:
        """Return what is wrong with scales and zero points, as a sentence; None if nothing is."""
        tensors = self.tensors()
        # missing and surplus tensors at once; the message names the first
        if differing := sorted(set(self.expected()) ^ set(tensors)):
            return f"kv_cache: {differing[0]} is {'stored, but the spec has none' if differing[0] in tensors else 'missing'}"
        for name, tensor in tensors.items():
            dtype = torch.float32 if name.endswith(_SCALE) else torch.int8
            # one number per layer for keys and one for values, in whatever shape
            if tensor.numel() != 1 or tensor.dtype != dtype:
                return f"kv_cache: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it is one number in {dtype}"
            if dtype == torch.float32 and not (float(tensor) > 0 and bool(torch.isfinite(tensor).all())):
                return f"kv_cache: {name} is {float(tensor)}, not a positive finite number"
        return None


def _new_name(attention: str, names: Mapping[str, str]) -> str:
    if attention in names:
        return names[attention]
    # most attention modules have no weight that a file could name: they are called as the modules inside them
    inside = ((new, module.removeprefix(attention)) for module, new in names.items() if module.startswith(f"{attention}."))
    found = {new.removesuffix(rest) for new, rest in inside if new.endswith(rest)}
    return found.pop() if len(found) == 1 else attention


def cache_from_record(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CacheState | None:
    """Invert ``record`` and ``tensors``; None if the record has no cache. TypeError, KeyError or ValueError if the record is damaged."""
    # folders of earlier versions have no such entry
    if not record.get("kv_cache"):
        return None
    spec, attentions = ActivationSpec.from_json(record["kv_cache"]), tuple(str(name) for name in record["attentions"])
    # without scales at first: it provides the names under which they are stored
    empty = CacheState(spec=spec, attentions=attentions)
    held = ({name: tensors[name + suffix] for name in empty.names if name + suffix in tensors} for suffix in (_SCALE, _ZERO))
    scales, zeros = held
    return CacheState(spec=spec, attentions=attentions, scales=scales, zeros=zeros)
