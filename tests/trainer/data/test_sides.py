"""Both sides of the split as windows: prompts that fill windows, and text of which all is measured."""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from decoct.models.common.cache_folder import cache_dir
from decoct.models.common.errors import UserError
from decoct.trainer.data.prepared_data import PreparedData, open_prepared, prepare_data
from decoct.trainer.data.sides import UNLABELLED, UNUSED
from decoct.trainer.data.windows import Windows
from decoct.trainer.settings import DataSettings
from tests.trainer.data.test_chats import chatty, write_rows

__all__ = ["chatty"]


def long_prompts(count: int, prompt: int = 400) -> list[dict[str, Any]]:
    return [{"prompt": f"{n}: " + "the cat sat " * (prompt // 12), "completion": f"yes {n}"} for n in range(count)]


def labels(windows: Windows) -> list[int]:
    return [int((windows[index]["labels"] != -100).sum()) for index in range(len(windows))]


def real(windows: Windows) -> list[int]:
    return list(chain.from_iterable(w["input_ids"][w["attention_mask"] == 1].tolist() for w in (windows[i] for i in range(len(windows)))))


@pytest.mark.parametrize("packing", [True, False])
def test_windows_in_which_nothing_is_learned_are_left_out_and_counted(tmp_path: Path, chatty: Any, packing: bool) -> None:
    settings = replace(write_rows(tmp_path, long_prompts(40)), seq_length=16, eval_tokens=1024, packing=packing)
    data = prepare_data(settings, chatty, cache_dir())
    everything = prepare_data(replace(settings, mask_prompts=False), chatty, cache_dir())
    assert min(labels(data.train) + labels(data.evaluation)) > 0
    assert sum(labels(data.train)) > 0
    kept, all_of_it = (len(each.train) + len(each.evaluation) for each in (data, everything))
    assert kept < all_of_it / 2
    assert data.left_out[UNLABELLED] > all_of_it / 2
    assert data.left_out["samples longer than a window (data.seq_length), which are cut"] == 40
    assert open_prepared(data.path).left_out == data.left_out


def test_packed_windows_that_are_kept_are_as_they_were(tmp_path: Path, chatty: Any) -> None:
    """Ids, labels and positions of each kept window are those of the same window among all."""
    settings = replace(write_rows(tmp_path, long_prompts(40, 120)), seq_length=32, eval_tokens=64)
    kept = prepare_data(settings, chatty, cache_dir()).train
    everything = prepare_data(replace(settings, mask_prompts=False), chatty, cache_dir()).train
    by_ids = {tuple(w["input_ids"].tolist()): w for w in (everything[i] for i in range(len(everything)))}
    assert 0 < len(kept) < len(everything)
    for index in range(len(kept)):
        window = kept[index]
        other = by_ids[tuple(window["input_ids"].tolist())]
        assert window["position_ids"].tolist() == other["position_ids"].tolist()
        learned = window["labels"] != -100
        assert (window["labels"][learned] == other["labels"][learned]).all()


def test_data_without_anything_to_learn_is_an_error(tmp_path: Path, chatty: Any) -> None:
    settings = replace(write_rows(tmp_path, long_prompts(2)), seq_length=8, eval_tokens=16)
    rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]}] * 20
    with pytest.raises(UserError, match="the text has 0 tokens"):
        prepare_data(replace(write_rows(tmp_path, rows), seq_length=8, eval_tokens=16), chatty, cache_dir())
    chatty.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    write_rows(tmp_path, [{"prompt": "the cat sat " * 30, "completion": "y"}])
    with pytest.raises(UserError, match=r"nothing is to be learned in \d+ windows of data\.seq_length=8.*mask_prompts"):
        prepare_data(settings, chatty, cache_dir())


def measured(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    return prepare_data(settings, tokenizer, cache_dir(), train=False)


@pytest.mark.parametrize("packing", [True, False])
def test_all_of_the_text_is_measured_where_nothing_trains(
    text_files: str, tokenizer: PreTrainedTokenizerBase, texts: list[str], packing: bool
) -> None:
    data = measured(DataSettings(files=(text_files,), seq_length=16, eval_tokens="all", packing=packing), tokenizer)
    expected = list(chain.from_iterable([*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts))
    assert len(data.train) == 0
    assert data.left_out == {}
    assert data.evaluation.tokens == len(real(data.evaluation))
    if packing:
        assert real(data.evaluation) == expected
        assert data.evaluation.lengths is not None
        assert data.evaluation.lengths[-1] == len(expected) % 16
        # every token but the first of each document or window is predicted
        firsts = sum((data.evaluation[i]["position_ids"] == 0).sum() for i in range(len(data.evaluation)))
        assert sum(labels(data.evaluation)) == len(expected) - firsts
    else:
        assert len(real(data.evaluation)) >= len(expected) - len(texts)


def test_a_text_shorter_than_a_window_is_measured(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat.")
    settings = DataSettings(files=(str(tmp_path / "a.txt"),), eval_tokens="all")
    data = measured(settings, tokenizer)
    ids = [*tokenizer("the cat sat on the mat.")["input_ids"], tokenizer.eos_token_id]
    assert real(data.evaluation) == ids
    assert labels(data.evaluation) == [len(ids) - 1]
    assert measured(replace(settings, eval_tokens=32_768), tokenizer).evaluation.tokens == len(ids), "there is no more"
    with pytest.raises(UserError, match="leaves nothing to train on"):
        prepare_data(settings, tokenizer, cache_dir())


def test_a_number_of_tokens_is_the_held_out_side_of_a_run_that_trains(text_files: str, tokenizer: PreTrainedTokenizerBase) -> None:
    settings = DataSettings(files=(text_files,), seq_length=16, eval_tokens=128)
    alone, trained = measured(settings, tokenizer), prepare_data(settings, tokenizer, cache_dir())
    assert alone.fingerprint != trained.fingerprint
    assert real(alone.evaluation) == real(trained.evaluation)
    assert alone.left_out[UNUSED] > 0


def test_a_conversation_without_anything_to_predict_cannot_be_measured(tmp_path: Path, chatty: Any) -> None:
    chatty.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    settings = replace(write_rows(tmp_path, [{"prompt": "the cat sat on ", "completion": "y"}]), seq_length=2, eval_tokens="all")
    assert sum(labels(measured(settings, chatty).evaluation)) > 0
    rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]}]
    with pytest.raises(UserError, match="fewer than two tokens"):
        measured(write_rows(tmp_path, rows), chatty)
