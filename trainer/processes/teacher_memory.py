"""Memory that a teacher's weights take on one device: the one estimate, for the decision of ``strategy: auto`` and for ``decoct plan``.

It is the largest amount held at any moment, counted tensor by tensor in the layout of ``models/teachers``:

- replicated fp32 and bf16: every parameter once, tied ones together;
- nf4: half a byte for each weight of the decoder's linears and an fp32 scale for each ``NF4_BLOCK`` of them; int8: a byte, and an fp32
  scale for each output row; everything else stays bf16;
- sharded: embedding, final norm and head whole, a share of the layers, and three layers more while one is gathered: its weights, the
  buffer that they arrived in, and the buffer of the layer before, which FSDP2 frees when the copy is done (torch 2.13);
- offloaded: embedding, final norm and head, the layer at work, and the next one on its way.

Buffers (rotary frequencies, nf4's table of 16 values) are not counted: they are a few kilobytes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...models.settings import NF4_BLOCK, LoadIn, Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GATHERED_LAYERS = 3
"""Whole layers of a sharded teacher that are in memory at the same time."""
OFFLOADED_LAYERS = 2
"""Whole layers of an offloaded teacher that are on the device at the same time."""


@dataclass(frozen=True, kw_only=True)
class TeacherSize:
    """Sizes of a model that decide how much memory it takes as a teacher, in elements, not bytes. Tied tensors count once."""

    parameters: int
    """All parameters."""
    outside: int
    """Outside the decoder layers: embedding, final norm, head."""
    layer: int
    """One decoder layer, the largest."""
    linear: int
    """Weights of the decoder's linears."""
    linear_rows: int
    """Output rows of the decoder's linears."""


def teacher_size(model: "PreTrainedModel") -> TeacherSize:
    """The size of a plain model, on any device, meta too."""
    from ...models.families import decoder_layers, decoder_linears, layers_prefix

    prefix = layers_prefix(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    linears = decoder_linears(model).values()
    return TeacherSize(
        parameters=sum(sizes.values()),
        outside=sum(size for name, size in sizes.items() if not (prefix and name.startswith(prefix))),
        layer=max((sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)), default=0),
        linear=sum(linear.out_features * linear.in_features for linear in linears),
        linear_rows=sum(linear.out_features for linear in linears),
    )


def teacher_bytes(size: TeacherSize, load_in: LoadIn, placement: Placement, ranks: int) -> int:
    """Bytes of a teacher's weights on each device.

    Args:
        size: Sizes of the teacher.
        load_in: Format of its weights in memory.
        placement: Place of its weights; int8 and nf4 are always replicated.
        ranks: Number of processes; a single process holds a sharded teacher whole.
    """
    # bytes per element of what is not rounded
    width = 4 if load_in == "fp32" else 2
    if load_in in ("nf4", "int8"):
        rounded = size.linear / 2 + 4 * size.linear / NF4_BLOCK if load_in == "nf4" else size.linear + 4 * size.linear_rows
        # embedding, norms and head stay in bf16
        return int(rounded) + width * (size.parameters - size.linear)
    if placement == "sharded" and ranks > 1:
        inside = size.parameters - size.outside
        # shares rounded up: the process that holds the most decides
        return width * (size.outside + -(-inside // ranks) + GATHERED_LAYERS * size.layer)
    if placement == "offloaded":
        return width * (size.outside + OFFLOADED_LAYERS * size.layer)
    return width * size.parameters
