"""Files are filled in order up to a limit."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from decoct.qat.export.shards import plan_shards, write_shards


def test_plan_keeps_the_order_and_the_limit() -> None:
    assert plan_shards({"a": 4, "b": 4}, limit=8) == {"model.safetensors": ["a", "b"]}
    assert plan_shards({"a": 4, "b": 5, "c": 3, "d": 20, "e": 1}, limit=8) == {
        "model-00001-of-00004.safetensors": ["a"],
        "model-00002-of-00004.safetensors": ["b", "c"],
        "model-00003-of-00004.safetensors": ["d"],
        "model-00004-of-00004.safetensors": ["e"],
    }


def test_write_makes_each_tensor_once(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> torch.Tensor:
        made.append(name)
        return torch.full((2,), float(len(made)))

    write_shards(tmp_path, plan_shards({"a": 8, "b": 8}, limit=8), make)
    assert made == ["a", "b"]
    assert load_file(tmp_path / "model-00002-of-00002.safetensors")["b"].tolist() == [2.0, 2.0]
