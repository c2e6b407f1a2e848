"""Pruning: whole channels (structured) and single weights (magnitude)."""

from .magnitude import cubic_keep as cubic_keep
from .magnitude import magnitude_masks as magnitude_masks
from .magnitude import sparsity as sparsity
from .magnitude import zero_masks as zero_masks
from .structured import alignment_hint as alignment_hint
from .structured import ffn_channel_scores as ffn_channel_scores
from .structured import prune_ffn as prune_ffn
