"""Tokenized once, split by documents, found again, mended when damaged."""

import json
import os
import resource
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from decoct.models.common.cache_folder import cache_dir
from decoct.models.common.errors import UserError
from decoct.models.common.files import sha256_json
from decoct.trainer.data import encoded_text
from decoct.trainer.data.documents import read_documents
from decoct.trainer.data.prepared_data import PreparedData, open_prepared, prepare_data
from decoct.trainer.data.tokens import tokenizer_hash
from decoct.trainer.data.windows import Windows
from decoct.trainer.settings import DataSettings


@pytest.fixture
def settings(text_files: str) -> DataSettings:
    return DataSettings(files=(text_files,), seq_length=16, eval_tokens=128)


def rows(windows: Windows) -> list[list[int]]:
    return [windows[i]["input_ids"][windows[i]["attention_mask"] == 1].tolist() for i in range(len(windows))]


def documents_of(windows: Windows, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Whole documents in packed windows (the last one is cut)."""
    return str(tokenizer.decode(list(chain.from_iterable(rows(windows))))).split("<|endoftext|>")[:-1]


def files_of(data: PreparedData) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in data.path.iterdir()}


def test_packed_windows_hold_whole_documents_on_one_side_only(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    data = prepare_data(settings, tokenizer, cache_dir())
    assert len(data.evaluation) == 8
    held, trained = documents_of(data.evaluation, tokenizer), documents_of(data.train, tokenizer)
    assert held
    assert set(held) < set(texts)
    assert len(trained) >= len(texts) - len(held) - 2
    assert set(trained) == set(texts) & set(trained)
    assert not set(held) & set(trained)
    assert trained == [text for text in texts if text in set(trained)], "training text is not in its own order"


def test_unpacked_windows_hold_one_document_each(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    data = prepare_data(replace(settings, packing=False), tokenizer, cache_dir())
    encoded = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    cut = [[ids[at : at + 16] for at in range(0, len(ids), 16) if len(ids) - at > 1] for ids in encoded]
    held, trained = rows(data.evaluation), rows(data.train)
    assert trained == [window for windows in cut if windows[0] in trained for window in windows]
    assert held == [window for first in held if (windows := _starting(cut, first)) for window in windows][: len(held)]
    # the last document held out may lie wholly behind the most tokens
    assert len([windows for windows in cut if windows[0] in trained or windows[0] in held]) >= len(texts) - 1
    assert 128 - 16 < data.evaluation.tokens <= 128
    shortest = min(range(len(trained)), key=lambda index: len(trained[index]))
    window = data.train[shortest]
    assert window["labels"].tolist() == [-100, *trained[shortest][1:], *[-100] * (16 - len(trained[shortest]))]


def _starting(documents: list[list[list[int]]], first: list[int]) -> list[list[int]]:
    return next((windows for windows in documents if windows[0] == first), [])


def test_second_start_reads_the_cache_and_other_ranks_open_it(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_data(settings, tokenizer, cache_dir())
    before = files_of(first)

    def never(*given: object, **more: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(encoded_text, "write_tokens", never)
    again, other = prepare_data(settings, tokenizer, cache_dir()), open_prepared(first.path)
    assert files_of(again) == before
    for data in (again, other):
        assert (data.fingerprint, data.text_fingerprint, data.description) == (first.fingerprint, first.text_fingerprint, first.description)
        assert rows(data.train) == rows(first.train)
        assert rows(data.evaluation) == rows(first.evaluation)
    assert sorted(before) == ["evaluation.starts", "evaluation.tokens", "manifest.json", "train.starts", "train.tokens"]
    assert [path.name for path in first.path.parent.iterdir()] == [first.fingerprint]


def test_fingerprint_follows_everything_that_changes_windows(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    from copy import deepcopy

    other_tokenizer = deepcopy(tokenizer)
    other_tokenizer.add_tokens(["cat"])
    changed = [
        replace(settings, seq_length=8),
        replace(settings, packing=False),
        replace(settings, eval_tokens=256),
        replace(settings, max_documents=50),
    ]
    prints = [prepare_data(settings, tok, cache_dir()).fingerprint for tok in (tokenizer, other_tokenizer)]
    prints += [prepare_data(each, tokenizer, cache_dir()).fingerprint for each in changed]
    assert len(set(prints)) == 6
    assert prepare_data(settings, tokenizer, tmp_path / "elsewhere").fingerprint == prints[0]


@pytest.mark.parametrize("name", ["train.tokens", "evaluation.tokens", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "remove"])
def test_damaged_entry_is_found_and_made_again(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, name: str, harm: str) -> None:
    first = prepare_data(settings, tokenizer, cache_dir())
    before = files_of(first)
    file = first.path / name
    data = bytearray(file.read_bytes())
    if harm == "remove":
        file.unlink()
    else:
        data[10] ^= 1
        file.write_bytes(data if harm == "flip" else data[:20])
    told: list[str] = []
    again = prepare_data(settings, tokenizer, cache_dir(), say=told.append)
    assert files_of(again) == before
    assert len(told) == 1
    assert "is damaged" in told[0]


def test_a_changed_word_in_the_manifest_is_found_too(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    first = prepare_data(settings, tokenizer, cache_dir())
    before = files_of(first)
    file = first.path / "manifest.json"
    file.write_text(file.read_text().replace(first.description, "another text"))
    told: list[str] = []
    again = prepare_data(settings, tokenizer, cache_dir(), say=told.append)
    assert "manifest.json is not what was written" in told[0]
    assert files_of(again) == before


def test_other_ranks_refuse_an_entry_that_is_not_whole(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    data = prepare_data(settings, tokenizer, cache_dir())
    os.truncate(data.path / "train.tokens", 8)
    with pytest.raises(UserError, match=r"train\.tokens has another size"):
        open_prepared(data.path)
    with pytest.raises(UserError, match=r"manifest\.json is missing.*DECOCT_CACHE"):
        open_prepared(tmp_path / "nowhere")


def test_failure_half_way_leaves_nothing_behind(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lines = [json.dumps({"text": f"line {n}"}) for n in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{broken"]))
    with pytest.raises(UserError, match=r"a\.jsonl:51 is not a JSON object"):
        prepare_data(DataSettings(files=(str(tmp_path / "a.jsonl"),), seq_length=8, eval_tokens=16), tokenizer, cache_dir())
    assert list((cache_dir() / "tokens").iterdir()) == []


@pytest.fixture
def book(tmp_path: Path, texts: list[str]) -> DataSettings:
    """One long document."""
    (tmp_path / "book.txt").write_text("\n".join(texts))
    return DataSettings(files=(str(tmp_path / "book.txt"),), seq_length=16, eval_tokens=64)


def ids_of(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    assert settings.files
    return [*tokenizer.encode(Path(settings.files[0]).read_text()), int(str(tokenizer.eos_token_id))]


@pytest.mark.parametrize("packing", [True, False])
def test_one_long_document_is_held_out_in_blocks_and_says_so(book: DataSettings, tokenizer: PreTrainedTokenizerBase, packing: bool) -> None:
    data = prepare_data(replace(book, packing=packing), tokenizer, cache_dir())
    assert data.description == "book.txt, held out in blocks from all over the text, inside documents"
    ids = ids_of(book, tokenizer)
    blocks = [ids[at : at + 16] for at in range(0, len(ids), 16)]
    held, trained = rows(data.evaluation), rows(data.train)
    assert len(held) == 4
    assert all(block in blocks for block in [*held, *trained][: -1 if not packing else None])
    assert not [block for block in held if block in trained], "a held-out window is trained on"
    assert len(held) + len(trained) >= len({*map(tuple, blocks)}) - 1


def test_the_older_rule_has_the_older_name_in_the_cache_and_the_end_of_the_text(
    book: DataSettings, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = prepare_data(replace(book, held_out="end"), tokenizer, cache_dir())
    assert data.description == "book.txt, held out from the end of the text, inside a document"
    ids = ids_of(book, tokenizer)
    assert list(chain.from_iterable(rows(data.evaluation))) == ids[-64:]
    assert list(chain.from_iterable(rows(data.train))) == ids[: (len(ids) - 64) // 16 * 16]
    facts = {"format": 2, "text": data.text_fingerprint, "tokenizer": tokenizer_hash(tokenizer), "seq_length": 16, "packing": True}
    assert data.fingerprint == sha256_json({**facts, "eval_tokens": 64}), "as every version before named it"
    assert prepare_data(book, tokenizer, cache_dir()).fingerprint != data.fingerprint


def test_text_shorter_than_a_window_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(UserError, match=r"the text has \d+ tokens in 1 document.*data\.seq_length=512"):
        prepare_data(DataSettings(files=(str(tmp_path / "a.txt"),)), tokenizer, cache_dir())
    assert list((cache_dir() / "tokens").iterdir()) == []


def test_documents_that_are_read_already_are_used(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    documents = read_documents(settings)
    other = replace(settings, files=("no such file.txt",))
    assert prepare_data(other, tokenizer, cache_dir(), documents=documents).text_fingerprint == documents.fingerprint


def test_full_disk_is_told_and_leaves_nothing(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """A limit on the size of files stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(UserError, match=r"tokenized text cannot be written .*free some space, or set .*DECOCT_CACHE"):
            prepare_data(settings, tokenizer, cache_dir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((cache_dir() / "tokens").iterdir()) == []


def test_a_file_in_place_of_an_entry_is_replaced(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    data = prepare_data(settings, tokenizer, cache_dir())
    expected = files_of(data)
    data.path.rename(data.path.with_name("aside"))
    data.path.write_text("in the way")
    assert files_of(prepare_data(settings, tokenizer, cache_dir(), say=lambda text: None)) == expected


def test_entry_that_another_run_finished_meanwhile_is_taken(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_data(settings, tokenizer, cache_dir())
    finished = first.path.rename(first.path.with_name("aside"))
    real = encoded_text.write_tokens

    def slowly(*given: Any, **more: Any) -> Any:
        finished.rename(first.path)
        return real(*given, **more)

    monkeypatch.setattr(encoded_text, "write_tokens", slowly)
    assert rows(prepare_data(settings, tokenizer, cache_dir()).train) == rows(first.train)
    assert [path.name for path in first.path.parent.iterdir()] == [first.fingerprint]
