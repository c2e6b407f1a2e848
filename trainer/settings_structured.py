"""Settings of structured pruning: what is kept of each axis of the model."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from .. import Bounds, Count, check_fields
from ..models.axis_map import AXES, WIDTHS, Axis
from ..models.shape_search import parse_budget
from ..models.sizes import ChannelScore, DepthScore
from .settings_search import SearchSettings


@dataclass(frozen=True, kw_only=True)
class StructuredSettings:
    """Remove channels, heads or layers, so that the dense model is smaller. Numbers state what is kept; give one at least, or a budget,
    within which the shape is searched."""

    at_least_one: ClassVar = (*AXES, "budget")

    ffn: Count | None = None
    """FFN channels kept in every layer."""
    heads: Count | None = None
    """Query heads kept in every layer: the same number for each key/value head."""
    kv_heads: Count | None = None
    """Key/value heads kept in every layer, each with its query heads."""
    hidden: Count | None = None
    """Channels of the hidden states that are kept, the same ones in the whole model."""
    layers: Count | None = None
    """Decoder layers that are kept, always with the first and the last."""
    budget: Annotated[float, Bounds(gt=0)] | str | None = None
    """Size of the result at most, in place of its shape: a share of the decoder layers' parameters (0.6), parameters of the model (80M),
    or bytes as served (900MB, 1.5GiB; search.bits and search.context)."""
    search: SearchSettings | None = None
    """How the shape of a budget is found."""
    score: ChannelScore | None = None
    """How channels and heads are ranked: weight_activation = mean activation times the norm of the weights that read it (the default);
    activation = mean activation of each window, root of the sum of squares over windows; magnitude = norm of all weights that are cut
    together; taylor = root of the sum of (weight x gradient of a window's loss) squared, over all weights that are cut together and over
    windows."""
    depth_score: DepthScore | None = None
    """How layers are chosen: block_influence = 1 - mean cosine between a layer's input and output (the default); greedy_loss = one by one
    the layer without which the loss is lowest, measured again after each; contiguous = the block without which the loss is lowest."""
    repair: bool = False
    """Repair the cut model without training: choose the factors of its norms (``hidden``), and refit the output projections of attention
    (``heads``, ``kv_heads``) and FFN (``ffn``) by least squares. Each is kept only if it lowers the KL divergence from the input of the
    stage on held-out windows."""

    rounds: Annotated[float, Bounds(gt=0, lt=1, why="it is a share of the decoder layers' parameters")] | None = None
    """Cut in rounds, each of which removes at most this share of the decoder layers' parameters (0.3) and then distils on its part of the
    stage's ``tokens`` or ``steps``. Default: one cut without distillation."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rounds is not None and self.budget is not None:
            raise ValueError(f"rounds={self.rounds} go to a given shape, and 'budget' searches one; give the shape that a search has found")
        if self.budget is not None:
            parse_budget(self.budget)
            if axes := [axis for axis in AXES if getattr(self, axis) is not None]:
                raise ValueError(f"budget={self.budget} searches the shape, and '{axes[0]}' gives it; leave one of them out")
        elif self.search is not None:
            raise ValueError("'search' finds the shape of a budget, and there is none; give 'budget', such as budget: 0.6")
        elif not self.kept:
            raise ValueError(f"structured pruning needs at least one of {', '.join(AXES)}: the number that is kept; or a 'budget'")
        if self.score is not None and not self.cuts_widths:
            raise ValueError(f"'score' ranks channels and heads, and none are removed; give one of {', '.join(WIDTHS)}, or 'depth_score'")
        if self.repair and not self.cuts_widths:
            raise ValueError(f"'repair' works on the widths, and none are cut; give one of {', '.join(WIDTHS)}, or leave 'repair' out")
        if self.depth_score is not None and self.layers is None and self.budget is None:
            raise ValueError("'depth_score' ranks layers, and none are removed; give 'layers'")

    @property
    def cuts_widths(self) -> bool:
        """Whether channels or heads are cut."""
        return self.budget is not None or any(axis in self.kept for axis in WIDTHS)

    @property
    def kept(self) -> dict[Axis, int]:
        """Axis -> what is kept of it, of the axes that are cut; {} while the shape of a budget is not found."""
        return {axis: number for axis in AXES if (number := getattr(self, axis)) is not None}

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes that are cut; all that may be, with a budget."""
        return AXES if self.budget is not None else tuple(self.kept)

    @property
    def found_by(self) -> SearchSettings:
        """``search`` with its default."""
        return self.search or SearchSettings()
