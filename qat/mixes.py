"""The mixtures of llama.cpp: which block type each matrix of a model gets when ``llama-quantize`` makes a Q4_K_M. It imports no torch.

    mix      most   v_proj                                       down_proj                     o_proj
    q2_k     q2_k   q3_k; q4_k where 4 heads or more share one   q3_k                          q3_k
    q3_k_s   q3_k   -                                            -                             -
    q3_k_m   q3_k   q4_k; layers 0 and 1 q5_k                    q4_k; first sixteenth q5_k    q4_k
    q3_k_l   q3_k   q5_k                                         q5_k                          q5_k
    q4_k_s   q4_k   layers 0 to 3 q5_k                           first eighth q5_k             -
    q4_k_m   q4_k   ends and thirds q6_k                         ends and thirds q6_k          -
    q5_k_s   q5_k   -                                            -                             -
    q5_k_m   q5_k   ends and thirds q6_k                         ends and thirds q6_k          -
    q6_k     q6_k   -                                            -                             -

Ends and thirds: the first and the last eighth of the layers, and of those between, every third. In models of 80 layers whose heads share
keys, a v_proj of q3_k or q4_k is q5_k. The head is q6_k, and so is an embedding that is tied to it; another embedding has the kind of most
matrices. Inputs that 256 does not divide: the blocks of 32 in ``SUPER_BLOCKS[kind].fallback``.

Source: llama.cpp ``src/llama-quant.cpp`` (llama_tensor_get_type_impl, tensor_type_fallback); for 5 bits in blocks of 32, where that file
has Q5_1, it is Q8_0 here, which is exact with every scale.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .spec import Kind, QuantSpec
from .super_blocks import SUPER_BLOCKS, WIDTH

MixName = Literal["q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"]
HEAD: Kind = "q6_k"
"""Kind of the head, and of an embedding that is tied to it."""
Shapes = Mapping[str, tuple[int, int]]
"""(out, in) of all linears of the decoder layers by full name, in module order."""


@dataclass(frozen=True)
class _Layer:
    """What the rules of a mixture ask of a matrix."""

    index: int
    """Number of its layer."""
    layers: int
    sharing: int
    """Query heads that share one head of keys and values."""

    def first(self, share: int) -> bool:
        return self.index < self.layers // share

    @property
    def of_ends_and_thirds(self) -> bool:
        eighth = self.layers // 8
        return self.first(8) or self.index >= 7 * self.layers // 8 or (self.index - eighth) % 3 == 2


_Rule = Callable[[_Layer], Kind | None]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A mixture."""

    most: Kind
    """Kind of the matrices without a rule."""
    rules: Mapping[str, _Rule] = field(default_factory=dict)
    """Last part of a linear's name -> its rule; None as the answer means ``most``."""


def _more(layer: _Layer) -> Kind | None:
    return "q6_k" if layer.of_ends_and_thirds else None


MIXES: dict[str, Mix] = {
    "q2_k": Mix(
        most="q2_k",
        rules={
            "v_proj": lambda layer: "q4_k" if layer.sharing >= 4 else "q3_k",
            "down_proj": lambda _: "q3_k",
            "o_proj": lambda _: "q3_k",
        },
    ),
    "q3_k_s": Mix(most="q3_k"),
    "q3_k_m": Mix(
        most="q3_k",
        rules={
            "v_proj": lambda layer: "q5_k" if layer.index < 2 else "q4_k",
            "down_proj": lambda layer: "q5_k" if layer.first(16) else "q4_k",
            "o_proj": lambda _: "q4_k",
        },
    ),
    "q3_k_l": Mix(most="q3_k", rules=dict.fromkeys(("v_proj", "down_proj", "o_proj"), lambda _: "q5_k")),
    "q4_k_s": Mix(
        most="q4_k",
        rules={
            "v_proj": lambda layer: "q5_k" if layer.index < 4 else None,
            "down_proj": lambda layer: "q5_k" if layer.first(8) else None,
        },
    ),
    "q4_k_m": Mix(most="q4_k", rules={"v_proj": _more, "down_proj": _more}),
    "q5_k_s": Mix(most="q5_k"),
    "q5_k_m": Mix(most="q5_k", rules={"v_proj": _more, "down_proj": _more}),
    "q6_k": Mix(most="q6_k"),
}
"""Name -> mixture."""


def mix_of_linears(mix: str, shapes: Shapes) -> dict[str, QuantSpec]:
    """Return the spec of every linear.

    Args:
        mix: A key of ``MIXES``.
        shapes: All linears of the decoder layers, those too that will not be quantized: rules count layers.
    """
    form, sharing = MIXES[mix], _sharing(shapes)
    parts = {name: name.rpartition(".")[2] for name in shapes}
    layers, seen = Counter(parts.values()), Counter[str]()
    found = {}
    for name, (_, columns) in shapes.items():
        part = parts[name]
        rule = form.rules.get(part)
        kind = (rule and rule(_Layer(seen[part], layers[part], sharing))) or form.most
        if part == "v_proj" and layers[part] == 80 and sharing > 1 and kind in ("q3_k", "q4_k"):
            kind = "q5_k"
        found[name] = mix_spec(kind, columns)
        seen[part] += 1
    return found


def mix_spec(kind: Kind, columns: int) -> QuantSpec:
    """Return a kind's spec, or that of its fallback if 256 does not divide the inputs."""
    fields: dict[str, Any] = {"kind": kind} if columns % WIDTH == 0 else SUPER_BLOCKS[kind].fallback
    return QuantSpec(**fields)


def found_mix(specs: Mapping[str, QuantSpec], shapes: Shapes) -> str | None:
    """Return the first mixture that gives all linears these specs; None if there is none, or no linear has super-blocks."""
    # without one, a uniform Q4_0 would pass for a mixture of narrow matrices
    if not any(spec.super_block for spec in specs.values()):
        return None
    return next((mix for mix in MIXES if mix_of_linears(mix, shapes) == specs), None)


def _sharing(shapes: Shapes) -> int:
    rows = {part: next((rows for name, (rows, _) in shapes.items() if name.endswith(part)), 0) for part in (".q_proj", ".k_proj")}
    return rows[".q_proj"] // rows[".k_proj"] if rows[".k_proj"] else 1
