"""A saved tiny model for teachers to be opened from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SavedModel = Callable[..., Path]


@pytest.fixture
def saved_model(tiny_model: Callable[..., Any], tmp_path: Path) -> SavedModel:
    """``saved_model(family, **config)``: the folder of a tiny model in several files; 64 hidden channels, untied."""

    def save(family: str = "llama", **config: Any) -> Path:
        folder = tmp_path / family
        shape = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False, "initializer_range": 0.05, **config}
        tiny_model(family, **shape).save_pretrained(folder, max_shard_size="100KB")
        return folder

    return save


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Two windows of random tokens, the second padded on the left."""
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}
