"""Prepared texts joined to a blend: shares, what is measured, what changes the fingerprint."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from decoct.models.common.cache_folder import cache_dir
from decoct.trainer.data.blended_data import blend_data
from decoct.trainer.data.joined_windows import PART, JoinedWindows, with_part
from decoct.trainer.data.order import WindowOrder
from decoct.trainer.data.prepared_data import PreparedData, prepare_data
from decoct.trainer.settings import DataSettings
from decoct.trainer.settings_text import BlendPart


@pytest.fixture
def make(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Callable[..., tuple[DataSettings, PreparedData]]:
    """``make(weights, **data)``: the blend of 45 and 15 documents."""
    for name, chosen in (("many", texts[:45]), ("few", texts[45:])):
        (tmp_path / name).mkdir()
        for number, text in enumerate(chosen):
            (tmp_path / name / f"{number:03d}.txt").write_text(text)

    def made(weights: tuple[float, float] = (0.3, 0.7), **given: Any) -> tuple[DataSettings, PreparedData]:
        blend = tuple(BlendPart(files=(str(tmp_path / name),), weight=weight) for name, weight in zip(("many", "few"), weights))
        settings = DataSettings(**{"blend": blend, "seq_length": 16, "eval_tokens": 160, **given})
        return settings, blend_data(settings, [prepare_data(part, tokenizer, cache_dir()) for part in settings.texts.values()])

    return made


def test_windows_come_in_the_shares_and_are_those_of_the_parts(make: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    settings, data = make()
    many, few = (prepare_data(part, tokenizer, cache_dir()) for part in settings.texts.values())
    windows = data.train
    assert isinstance(windows, JoinedWindows)
    assert (windows.blend.names, windows.blend.counts, windows.blend.sizes) == (("many", "few"), (3, 7), (len(many.train), len(few.train)))
    assert len(windows) == len(many.train) + len(few.train) and windows.tokens == many.train.tokens + few.train.tokens
    for index, (text, at) in ((0, (many, 0)), (len(many.train), (few, 0)), (len(windows) - 1, (few, len(few.train) - 1))):
        assert torch.equal(windows[index]["input_ids"], text.train[at]["input_ids"])
    assert torch.equal(windows[-1]["input_ids"], windows[len(windows) - 1]["input_ids"])
    with pytest.raises(IndexError):
        windows[len(windows)]
    first = WindowOrder(windows, 0).at(0, 100)
    assert sum(index < len(many.train) for index in first) == 30
    assert with_part(windows, 0)[PART].tolist() == [True, False] and with_part(windows, len(many.train))[PART].tolist() == [False, True]
    assert PART not in with_part(many.train, 0)
    assert data.description.startswith("a blend of many (30.0%): ")


def test_each_part_is_measured_by_its_share_of_what_is_held_out(make: Any) -> None:
    _, data = make()
    held = data.evaluation
    # 10 windows: 3 of the one, 7 of the other
    assert held.blend.sizes == (3, 7) and held.tokens == 160
    _, other = make((0.7, 0.3))
    assert other.evaluation.blend.sizes == (7, 3)
    assert torch.equal(other.evaluation[0]["input_ids"], held[0]["input_ids"]), "the same text stays held out whatever the weights are"
    _, tiny = make((0.999, 0.001))
    assert tiny.evaluation.blend.sizes == (10, 1), "no part goes unmeasured"


def test_a_weight_changes_the_fingerprint_and_tokenizes_nothing_again(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, data = make()
    entries = sorted(path.name for path in (cache_dir() / "tokens").iterdir())
    _, other = make((0.5, 0.5))
    assert sorted(path.name for path in (cache_dir() / "tokens").iterdir()) == entries
    assert data.fingerprint != other.fingerprint and data.text_fingerprint == other.text_fingerprint
    assert make((3, 7))[1].fingerprint == data.fingerprint, "only the proportion matters"


def test_shares_are_of_tokens_where_windows_are_padded(make: Any) -> None:
    _, data = make((0.5, 0.5), packing=False)
    blend = data.train.blend
    means = [part.tokens / len(part) for part in data.train.parts]
    assert means[0] != means[1]
    read = [count * mean for count, mean in zip(blend.counts, means)]
    assert read[0] == pytest.approx(read[1], rel=1e-3)
    assert not data.packed and "position_ids" not in data.train[0]


def test_tokens_in_place_of_weights_give_the_same_shares(make: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    settings, data = make()
    assert settings.blend is not None
    counted = replace(
        settings, blend=tuple(replace(part, weight=None, tokens=tokens) for part, tokens in zip(settings.blend, (3000, 7000)))
    )
    again = blend_data(counted, [prepare_data(part, tokenizer, cache_dir()) for part in counted.texts.values()])
    assert again.fingerprint == data.fingerprint
