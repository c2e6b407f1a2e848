"""Pruning: the shape of a model (structured) and single weights (magnitude)."""

from .magnitude import cubic_keep as cubic_keep
from .magnitude import magnitude_masks as magnitude_masks
from .magnitude import sparsity as sparsity
from .magnitude import zero_masks as zero_masks
from .shape_choice import select as select
from .structured import cut as cut
