"""The matrices of a model that a quantization scheme quantizes, from its shape alone."""

from typing import TYPE_CHECKING, NamedTuple

from .shapes import ModelShape

if TYPE_CHECKING:
    from ...qat.scheme import QuantScheme
    from ...qat.spec import QuantSpec


class Quantized(NamedTuple):
    """A matrix that is quantized."""

    rows: int
    columns: int
    spec: "QuantSpec"

    @property
    def scales(self) -> int:
        """Return the number of its scales."""
        rows, groups = self.spec.scale_shape(self.rows, self.columns)
        return rows * groups


def quantized_linears(shape: ModelShape, scheme: "QuantScheme") -> dict[str, Quantized]:
    """Return the quantized matrices: linears of the decoder layers, and embedding and head if requested.

    Raises:
        ValueError: a pattern changes nothing, or two change one module differently.
    """
    # the rule that the stage itself applies, so that a plan cannot count other matrices
    specs = scheme.of_linears(shape.linears)
    found = {name: Quantized(*shape.linears[name], spec) for name, spec in specs.items()}
    ends = {"embedding": shape.embedding, "head": shape.head}
    for key, spec in scheme.of_ends(shape.hidden, **ends).items():
        # a tied head has no name: its scheme is the embedding's
        if name := ends[key]:
            rows, columns = shape.tensors[f"{name}.weight"]
            found[name] = Quantized(rows, columns, spec)
    return found
