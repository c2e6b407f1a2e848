"""The benchmark of estimates of a cut's loss: its squares over windows are the score `taylor`, and every cut has a row of each estimate."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ..support.pruned_families import LAYERS, VOCABULARY, tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import outliers  # pyright: ignore[reportMissingImports] - a script, found by sys.path
import pruning_taylor  # pyright: ignore[reportMissingImports]

from decoct.models.pruning.scores import scored

IDS = torch.randint(1, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(4))


def test_the_squares_of_windows_are_the_score_taylor() -> None:
    model = tiny("llama", dtype=torch.float32)
    found = pruning_taylor.estimates(model, IDS, ["ffn", "heads", "kv_heads", "hidden"])
    ours = scored(model, [{"input_ids": IDS}], ["ffn", "heads", "kv_heads", "hidden"], score="taylor")
    squares = pruning_taylor.scores_of(found["window squares"], LAYERS)
    for axis, parts in ours.axes.items():
        for one, other in zip(parts, squares.axes[axis], strict=True):
            torch.testing.assert_close(one.square(), other.float(), rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(ours.hidden_of(range(LAYERS)).square(), squares.hidden_of(range(LAYERS)).float(), rtol=1e-3, atol=1e-8)


def test_sums_before_and_after_the_size_differ_as_they_must() -> None:
    found = {name: parts["ffn"] for name, parts in pruning_taylor.estimates(tiny("llama", dtype=torch.float32), IDS, ["ffn"]).items()}
    for small, large in (("slope", "sizes"), ("slope", "window slopes"), ("sizes", "window sizes"), ("window slopes", "window sizes")):
        for one, other in zip(found[small], found[large], strict=True):
            # equal where no signs differ
            assert bool((one <= other * (1 + 1e-6)).all()) and float(one.sum()) < float(other.sum()), (small, large)
    one_window = pruning_taylor.estimates(tiny("llama", dtype=torch.float32), IDS[:1], ["ffn"])
    torch.testing.assert_close(one_window["slope"]["ffn"], one_window["window slopes"]["ffn"])
    torch.testing.assert_close(one_window["slope"]["ffn"][0].square(), one_window["window slopes squared"]["ffn"][0])


def test_every_cut_has_a_row_of_each_estimate_and_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path / "model")
    rows: list[Any] = pruning_taylor.measure(outliers.Case(str(tmp_path / "model"), IDS[:3], IDS[3:]), ["ffn", "hidden"])
    assert len({row.case for row in rows}) == 4
    assert len(rows) == 4 * (6 + len(pruning_taylor.OTHERS))
    assert all(row.value > 0 for row in rows)
