"""The precision ladder of an architecture: bytes of its weights at each precision, bare and as stored, and of its KV cache."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.capabilities import percent
from ...models.common.errors import UserError
from ...models.families import text_config
from .shapes import ModelShape, config_from, config_of, shape_of

if TYPE_CHECKING:
    from rich.console import Console

LONGEST_CONTEXT = 8192
"""Default context of the KV cache, limited to the model's own."""


@dataclass(frozen=True)
class Rung:
    """A mix of precisions, in bits per number; a group of 0 means no scales."""

    name: str
    body: float
    """Bits of the weights of the decoder's linears."""
    rest: float
    """Bits of everything else: embeddings, head, norms."""
    group: int = 0
    """Weights that share a scale (bf16)."""
    zero_points: bool = False
    """Whether a group also has a zero point, as wide as a weight."""
    embeddings_group: int = 0
    """Elements of embedding and head per scale if those are rounded too; norms then stay bf16."""


RUNGS = (
    Rung("FP32", 32, 32),
    Rung("BF16", 16, 16),
    Rung("INT8", 8, 16, group=128),
    Rung("INT4", 4, 16, group=128),
    Rung("INT4, groups of 32", 4, 16, group=32),
    Rung("INT4 with zero points", 4, 16, group=128, zero_points=True),
    Rung("INT4, embeddings and head INT8", 4, 8, group=128, embeddings_group=128),
)


@dataclass(frozen=True, kw_only=True)
class LadderRow:
    """One rung for one model, in bytes."""

    name: str
    bare: int
    """Parameters x the width of the body: the figure people quote."""
    linears: int
    """Codes of the decoder's linears."""
    scales: int
    """Scales and zero points, of embeddings too."""
    embeddings: int
    """Embedding, and the head unless it is tied."""
    norms: int
    """Norms and biases."""
    kv_cache: int
    """Keys and values in bf16."""

    @property
    def stored(self) -> int:
        """All weights."""
        return self.linears + self.scales + self.embeddings + self.norms

    @property
    def served(self) -> int:
        """Weights and KV cache."""
        return self.stored + self.kv_cache


def ladder(shape: ModelShape, *, context: int, batch: int, nominal: float | None = None) -> list[LadderRow]:
    """Return every rung for ``shape``.

    Args:
        shape: The model.
        context: Tokens of each sequence in the cache; batch: sequences.
        nominal: Number of parameters for the bare figure, such as 70e9; None: the model's own count.
    """
    tables = sum(rows * columns for rows, columns in _tables(shape).values())
    cache = kv_cache_bytes(shape, context, batch)
    return [_row(rung, shape, tables, cache, nominal or shape.parameters) for rung in RUNGS]


def kv_cache_bytes(shape: ModelShape, context: int, batch: int) -> int:
    """Return the bytes of keys and values of all layers in bf16."""
    # keys and values, 2 bytes each
    return 2 * 2 * shape.layers * shape.dimensions.kv_heads * shape.dimensions.head_dim * context * batch


def default_context(shape: ModelShape) -> int:
    """Return the model's own context, at most 8,192 tokens."""
    return min(LONGEST_CONTEXT, getattr(text_config(shape.config), "max_position_embeddings", None) or LONGEST_CONTEXT)


def find_shape(what: str) -> ModelShape:
    """Find the model of a folder, hub id, stored name, or size such as ``70B`` (the nearest stored architecture).

    Raises: UserError when it is none of them.
    """
    from ...configs.architectures import architecture, names

    wanted = nominal_size(what)
    if wanted is None:
        return shape_of(*_config(what, names()))
    shapes = {name: shape_of(config_from(architecture(name)), f"stored architecture of {name}") for name in names()}
    # a size names no model: the nearest stored architecture stands for it, by relative distance
    name = min(shapes, key=lambda key: abs(shapes[key].parameters - wanted) / wanted)
    # further off, the stored shape would stand for another model
    if abs(shapes[name].parameters - wanted) > 0.25 * wanted:
        known = ", ".join(f"{key} ({shape.parameters / 1e9:.3g}B)" for key, shape in shapes.items())
        raise UserError(f"no stored architecture has about {what} parameters; give a model folder, a hub id, or one of {known}")
    return shapes[name]


def nominal_size(what: str) -> float | None:
    """Parse a size such as ``70B`` into 70e9; None if the text is not a size above 0, or names a folder."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MBT])", what, re.IGNORECASE)
    # a folder may be called 7B
    if size is None or not float(size[1]) or Path(what).is_dir():
        return None
    return float(size[1]) * {"M": 1e6, "B": 1e9, "T": 1e12}[size[2].upper()]


def _config(what: str, stored: Sequence[str]) -> Any:
    try:
        return config_of(what)
    except UserError as error:
        raise UserError(f"{error}. Stored architectures: {', '.join(stored)}; or give a size such as 70B") from error


def _tables(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Return the matrices outside the decoder layers: embedding and head (once if tied)."""
    found: dict[str, tuple[int, int]] = {}
    for name, sizes in shape.tensors.items():
        # two dimensions: vectors outside the layers are norms
        if len(sizes) == 2 and not shape.within(name):
            found[name] = (sizes[0], sizes[1])
    return found


def _row(rung: Rung, shape: ModelShape, tables: int, cache: int, counted: float) -> LadderRow:
    groups = shape.linear // rung.group if rung.group else 0
    # two bytes for a bf16 scale; a zero point has the width of a code
    scales = 2 * groups + (int(groups * rung.body / 8) if rung.zero_points else 0)
    if rung.embeddings_group:
        scales += 2 * tables // rung.embeddings_group
    # what is neither a linear nor a table: norms and biases, which no precision rounds below 16 bits
    other = shape.parameters - shape.linear - tables
    return LadderRow(
        name=rung.name,
        bare=int(counted * rung.body / 8),
        linears=int(shape.linear * rung.body / 8),
        scales=scales,
        embeddings=int(tables * rung.rest / 8),
        norms=int(other * (rung.rest if rung.rest > 16 else 16) / 8),
        kv_cache=cache,
    )


def _count(option: str, text: str, example: str) -> int:
    """Parse a whole number in the notation of recipes; UserError with an example for anything else."""
    from ...configs.scalars import parse_number

    number = parse_number(text)
    # a percentage or a fraction counts no tokens
    if number is None or number[1] or number[0] != int(number[0]) or number[0] < 1:
        raise UserError(f"{option}={text} must be a whole number of at least 1, such as {example}")
    return int(number[0])


def run_footprint(what: str, context: str | None, batch: str, as_json: bool) -> None:
    """Print the ladder of a model."""
    import json
    from dataclasses import asdict

    from ..terminal.console import CleanConsole

    batches, asked = _count("--batch", batch, "8"), context and _count("--context", context, "32768 or 32k")
    shape = find_shape(what)
    length = asked or default_context(shape)
    rows = ladder(shape, context=length, batch=batches, nominal=nominal_size(what))
    if as_json:
        plain = [{**asdict(row), "stored": row.stored, "served": row.served} for row in rows]
        print(
            json.dumps(
                {"model": shape.source, "parameters": shape.parameters, "context": length, "batch": batches, "rows": plain}, indent=1
            )
        )
        return
    _draw(shape, rows, length, batches, CleanConsole())


def _draw(shape: ModelShape, rows: list[LadderRow], context: int, batch: int, console: "Console") -> None:
    from ..report.tables import WIDE
    from ..terminal.fitting_table import fitting_table
    from .units import size

    # a pipe has no width: nothing is left out there
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    console.print(f"{shape.source}: {shape.describe()}", markup=False, highlight=False)
    console.print(f"{shape.parameters:,} parameters; KV cache of {batch} x {context:,} tokens in bf16", highlight=False)
    headings = ("precision", "bare", "linears", "scales", "embeddings, head", "norms", "weights", "KV cache", "together")
    cells = []
    for row in rows:
        parts = (row.bare, row.linears, row.scales, row.embeddings, row.norms, row.stored, row.kv_cache, row.served)
        cells.append((row.name, *(size(count) if count else "-" for count in parts)))
    console.print(
        fitting_table(
            None,
            headings,
            cells,
            console.width,
            text=headings[:1],
            left_out_first=("norms", "scales", "linears", "embeddings, head"),
            short={"embeddings, head": "emb+head"},
            elsewhere="--json has them",
        )
    )
    console.print("bare = parameters x width; weights = as stored: embeddings, head and norms stay bf16 unless the row says otherwise")
    weights = shape.family.weights
    if weights.others:
        told = f"{percent(weights.share())} of the decoder's weights are in linears, which are rounded; {weights.left()} stay bf16"
        console.print(f"{told}, among the norms", markup=False, highlight=False, soft_wrap=True)
