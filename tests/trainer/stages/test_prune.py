"""Stage `prune`: what structured scores are taken on."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from decoct.models.pruning.structured import ffn_channel_scores
from decoct.trainer.settings_pruning import PruneSettings, StructuredSettings
from decoct.trainer.stages import prune, prune_structured
from decoct.trainer.stages.calibration import calibration_text
from decoct.trainer.stages.context import StageContext


def scored_on(context: StageContext, monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Indices of the training windows that the stage scores channels on."""
    rows: list[torch.Tensor] = []

    def scores(model: Any, batches: Iterable[Any]) -> list[torch.Tensor]:
        batches = list(batches)
        rows.extend(row for batch in batches for row in batch["input_ids"])
        return ffn_channel_scores(model, batches)

    monkeypatch.setattr(prune_structured, "ffn_channel_scores", scores)
    prune.finish(PruneSettings(structured=StructuredSettings(ffn=48), calibration_tokens=tokens), context, None)
    windows = context.run.data.train
    place = {tuple(windows[index]["input_ids"].tolist()): index for index in range(len(windows))}
    return [place[tuple(row.tolist())] for row in rows]


def test_channels_are_scored_on_windows_from_all_over_the_text(
    make_context: Callable[..., StageContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context("01-prune", kind="prune")
    count = len(context.run.data.train)
    seen = scored_on(context, monkeypatch, 16 * 32)
    assert len(set(seen)) == 16
    # in each quarter of the text, where the first 16 windows lie in one
    assert {4 * index // count for index in seen} == {0, 1, 2, 3}
    other = scored_on(make_context("02-prune", kind="prune", seed=1), monkeypatch, 16 * 32)
    assert other != seen
    assert scored_on(make_context("03-prune", kind="prune"), monkeypatch, 32 * 32)[:16] == seen


def test_channels_are_scored_on_the_text_that_rounding_is_calibrated_on(
    make_context: Callable[..., StageContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context("01-prune", kind="prune", seed=3)
    wanted = torch.cat([batch["input_ids"] for batch in calibration_text(context.run.data.train, 300, 3).batches])
    seen = scored_on(context, monkeypatch, 300)
    assert torch.equal(torch.stack([context.run.data.train[index]["input_ids"] for index in seen]), wanted)
