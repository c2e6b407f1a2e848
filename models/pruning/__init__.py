"""Pruning: the shape of a model (structured), and single weights by magnitude, Wanda or SparseGPT, also in N:M patterns."""

from typing import TYPE_CHECKING

from ... import lazy_names

if TYPE_CHECKING:
    from .layerwise import OneShot as OneShot
    from .layerwise import prune_layers as prune_layers
    from .magnitude import cubic_keep as cubic_keep
    from .magnitude import magnitude_masks as magnitude_masks
    from .magnitude import sparsity as sparsity
    from .magnitude import zero_masks as zero_masks
    from .pattern import Pattern as Pattern
    from .pattern import parse_pattern as parse_pattern
    from .selection import pattern_mask as pattern_mask
    from .shape_choice import select as select
    from .structured import cut as cut

__getattr__, __dir__ = lazy_names(__name__)
