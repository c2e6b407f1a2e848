"""Datasets of the hub, downloaded whole, streamed, or read shard by shard by several processes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decoct.models.common.cache_folder import cache_dir
from decoct.models.common.errors import UserError
from decoct.trainer.data import hub, units
from decoct.trainer.data.documents import read_documents
from decoct.trainer.data.pieces import HubPiece, plain_units, units_from
from decoct.trainer.data.prepared_data import prepare_data
from decoct.trainer.settings import DataSettings

from .test_chats import talks
from .test_shared_text import content, count_units, load, together

__all__ = ["load"]


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset repository as the hub has them, as a local folder, and no network (nor retries to reach it)."""
    import datasets

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "stories"
    folder.mkdir()
    pq.write_table(pa.table({"body": [f"story {n}" for n in range(5)], "n": list(range(5))}), folder / "train-0.parquet")
    return folder


def test_hub_dataset_is_read_by_field(hub_folder: Path) -> None:
    settings = DataSettings(hub=str(hub_folder), text_field="body", max_documents=3)
    documents = read_documents(settings)
    assert list(documents) == ["story 0", "story 1", "story 2"]
    assert documents.fingerprint == read_documents(settings).fingerprint
    with pytest.raises(UserError, match=r"data\.text_field='text' is not in data\.hub .*fields there: body, n"):
        read_documents(DataSettings(hub=str(hub_folder)))
    with pytest.raises(UserError, match=r"data\.text_field='n' holds int64 in data\.hub"):
        read_documents(DataSettings(hub=str(hub_folder), text_field="n"))


def test_conversations_of_the_hub_lose_the_nulls_of_their_schema(hub_folder: Path) -> None:
    talks = [
        [{"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": {"city": "Oslo"}}}]}],
        [{"role": "assistant", "content": "y", "tool_calls": [{"function": {"name": "g", "arguments": {"hour": 7}}}]}],
    ]
    pq.write_table(pa.Table.from_pylist([{"conversations": talk, "id": 1} for talk in talks]), hub_folder / "train-0.parquet")
    documents = read_documents(DataSettings(hub=str(hub_folder), kind="chat"))
    assert documents.chats is not None
    assert [row for _, row in documents.chats()] == [{"conversations": talk} for talk in talks]
    pq.write_table(pa.table({"prompt": ["x"], "chosen": ["y"]}), hub_folder / "train-0.parquet")
    with pytest.raises(UserError, match=r"has none of 'messages', .*; it has prompt, chosen"):
        read_documents(DataSettings(hub=str(hub_folder), kind="chat"))


def test_part_of_a_hub_dataset_is_streamed_at_a_fixed_revision(hub_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: the hub's answer is given, and the dataset's files lie in a folder."""
    import datasets
    import huggingface_hub

    calls: list[dict[str, object]] = []
    load = datasets.load_dataset

    def load_from_folder(name: str, config: str | None, *, split: str, **more: object) -> object:
        calls.append({"name": name, **more})
        return load(str(hub_folder), config, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_from_folder)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name: SimpleNamespace(sha="abc123"))
    documents = read_documents(DataSettings(hub="someone/stories", text_field="body", max_documents=2))
    assert calls == [{"name": "someone/stories", "revision": "abc123", "streaming": True}]
    assert list(documents) == list(documents) == ["story 0", "story 1"]


def test_hub_errors_name_the_keys(hub_folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.hub_split='nope'.*Unknown split"):
        read_documents(DataSettings(hub=str(hub_folder), hub_split="nope"))
    shutil.rmtree(hub_folder)
    for limit in (None, 2):
        with pytest.raises(UserError, match=r"data\.hub='no-such/set' .*cannot be loaded.*data\.files"):
            read_documents(DataSettings(hub="no-such/set", max_documents=limit))


def write_shards(folder: Path, texts: list[str]) -> DataSettings:
    """Seven files; one of them holds blank rows alone, one has nulls."""
    shutil.rmtree(folder)
    folder.mkdir()
    for number in range(6):
        rows: list[str | None] = [*texts[number::6], None, " "]
        pq.write_table(pa.table({"body": rows, "n": list(range(len(rows)))}), folder / f"train-{number}.parquet")
    pq.write_table(pa.table({"body": ["", ""], "n": [1, 2]}), folder / "train-6.parquet")
    return DataSettings(hub=str(folder), text_field="body", seq_length=16, eval_tokens=64, hub_shards=True)


@pytest.mark.parametrize("size", [1, 3])
def test_shards_that_processes_share_give_the_windows_of_the_whole_dataset(
    size: int, load: Any, texts: list[str], hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = write_shards(hub_folder, texts)
    monkeypatch.setattr(units, "MOST_UNITS", 4)
    seen = count_units(monkeypatch)
    shared = together(settings, load, size)
    assert not list(tmp_path.rglob("*.arrow")), "the rows themselves are not kept"
    whole = content(prepare_data(replace(settings, hub_shards=False), load, tmp_path / "whole"))
    assert list(tmp_path.rglob("*.arrow"))
    assert sorted(seen) == [0, 1, 2, 3], "seven shards in at most four units"
    assert shared.left_out["blank documents"] == 14
    # the name of the entry has the revision, which a download has not
    names = {name for name in whole if not name.endswith(".json")}
    assert names
    assert {name: content(shared)[name] for name in names} == {name: whole[name] for name in names}


def test_conversations_are_read_by_shards(load: Any, hub_folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(hub_folder)
    hub_folder.mkdir()
    for number in range(3):
        rows = [{"messages": json.dumps(row["messages"])} for row in talks(30)[number::3] if "messages" in row]
        pq.write_table(
            pa.Table.from_pylist([*rows, {"messages": "not json"}] if number == 1 else rows), hub_folder / f"train-{number}.parquet"
        )
    settings = DataSettings(hub=str(hub_folder), kind="chat", seq_length=64, eval_tokens=128, hub_shards=True)
    shared = together(settings, load, 2)
    whole = prepare_data(replace(settings, hub_shards=False), load, tmp_path / "whole")
    assert shared.samples is not None
    assert whole.samples is not None
    assert (shared.samples["read"], shared.samples["bad"]) == (whole.samples["read"], whole.samples["bad"])
    assert shared.samples["first_bad"].startswith("shard 2, row ")
    for name in ("train.tokens", "evaluation.tokens"):
        assert content(shared)[name] == content(whole)[name]


def test_a_shard_that_cannot_be_read_is_named_and_the_others_are_kept(
    load: Any, texts: list[str], hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = write_shards(hub_folder, texts)
    whole = content(together(settings, load, 1))
    monkeypatch.setenv("DECOCT_CACHE", str(tmp_path / "again"))
    real = datasets.IterableDataset.shard

    def broken(self: Any, num_shards: int, index: int, contiguous: bool = True) -> Any:
        if index == 4:
            raise ConnectionError("the line is cut")
        return real(self, num_shards, index, contiguous)

    with monkeypatch.context() as patch:
        patch.setattr(datasets.IterableDataset, "shard", broken)
        said = r"shard 5 of 7 cannot be read \(ConnectionError: the line is cut\); start again: shards that are tokenized are kept"
        with pytest.raises(UserError, match=said):
            together(settings, load, 1)
    assert len([path for path in (cache_dir() / "tokens").rglob("0*") if path.is_dir()]) == 4
    seen = count_units(monkeypatch)
    assert content(together(settings, load, 1)) == whole
    assert seen == [4, 5, 6]


def test_every_process_must_see_the_same_shards(hub_folder: Path) -> None:
    hub._opened.cache_clear()
    piece = HubPiece(str(hub_folder), None, "train", None, 1, 9)
    assert units_from(plain_units([(piece,)])) == [(piece,)]
    with pytest.raises(UserError, match=r"has 1 shards here and 9 on rank 0; install the same datasets"):
        list(hub.shard_rows(piece))


def test_shards_need_a_whole_dataset_of_the_hub() -> None:
    with pytest.raises(ValueError, match=r"hub_shards=true is for a whole dataset of the hub .* max_documents"):
        DataSettings(hub="a/b", hub_shards=True, max_documents=5)
    with pytest.raises(ValueError, match=r"hub_shards=true is for a whole dataset of the hub .* other sources"):
        DataSettings(files=("a.txt",), hub_shards=True)
