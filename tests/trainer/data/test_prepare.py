"""Tokenized once, split by documents, found again, mended when damaged."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from decoct.models.errors import UserError
from decoct.trainer.cache import cache_dir
from decoct.trainer.data import prepare
from decoct.trainer.data.prepare import PreparedData, open_prepared, prepare_data
from decoct.trainer.data.text import read_documents
from decoct.trainer.data.windows import Windows
from decoct.trainer.settings import DataSettings


@pytest.fixture
def settings(text_files: str) -> DataSettings:
    return DataSettings(files=(text_files,), seq_length=16, eval_tokens=128)


def rows(windows: Windows) -> list[list[int]]:
    return [windows[i]["input_ids"][windows[i]["attention_mask"] == 1].tolist() for i in range(len(windows))]


def documents_of(windows: Windows, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Whole documents in packed windows (the last one is cut)."""
    return str(tokenizer.decode(sum(rows(windows), []))).split("<|endoftext|>")[:-1]


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


def test_unpacked_windows_start_documents_and_pad_the_rest(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    data = prepare_data(replace(settings, packing=False), tokenizer, cache_dir())
    assert 0 < data.evaluation.tokens <= 128
    seen = "".join(str(tokenizer.decode(row)) for row in rows(data.train) + rows(data.evaluation))
    complete = [text for text in texts if f"{text}<|endoftext|>" in seen]
    assert len(complete) >= len(texts) - 1
    starts = [row for row in rows(data.train) if str(tokenizer.decode(row)).startswith("document ")]
    assert len(starts) >= len(texts) - 8
    window = data.train[[len(row) for row in rows(data.train)].index(min(len(row) for row in rows(data.train)))]
    assert (window["labels"][window["attention_mask"] == 0] == -100).all()


def test_second_start_reads_the_cache_and_other_ranks_open_it(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_data(settings, tokenizer, cache_dir())
    before = files_of(first)

    def never(*given: object, **more: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(prepare, "write_tokens", never)
    again, other = prepare_data(settings, tokenizer, cache_dir()), open_prepared(first.path)
    assert files_of(again) == before
    for data in (again, other):
        assert (data.fingerprint, data.text_fingerprint, data.description) == (first.fingerprint, first.text_fingerprint, first.description)
        assert rows(data.train) == rows(first.train)
        assert rows(data.evaluation) == rows(first.evaluation)
    assert sorted(before) == ["evaluation.tokens", "manifest.json", "train.tokens"]
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


def test_one_long_document_is_held_out_from_its_end_and_says_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    (tmp_path / "book.txt").write_text("\n".join(texts))
    data = prepare_data(DataSettings(files=(str(tmp_path / "book.txt"),), seq_length=16, eval_tokens=64), tokenizer, cache_dir())
    assert data.description == "book.txt, held out from the end of the text, inside a document"
    ids = [*tokenizer("\n".join(texts))["input_ids"], tokenizer.eos_token_id]  # pyright: ignore[reportGeneralTypeIssues]
    assert sum(rows(data.evaluation), []) == ids[-64:]
    assert sum(rows(data.train), []) == ids[: (len(ids) - 64) // 16 * 16]


def test_text_shorter_than_a_window_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(UserError, match=r"the text has \d+ tokens in 1 document.*data\.seq_length=512"):
        prepare_data(DataSettings(files=(str(tmp_path / "a.txt"),)), tokenizer, cache_dir())
    assert list((cache_dir() / "tokens").iterdir()) == []


def test_documents_that_are_read_already_are_used(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    documents = read_documents(settings)
    other = replace(settings, files=("no such file.txt",))
    assert prepare_data(other, tokenizer, cache_dir(), documents=documents).text_fingerprint == documents.fingerprint


def test_full_disk_is_told_and_leaves_nothing(settings: DataSettings, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A limit on the size of files, in a process of its own, stands for a full disk."""
    tokenizer.save_pretrained(tmp_path / "tok")
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from transformers import AutoTokenizer\n"
        "from decoct.models.errors import UserError\n"
        "from decoct.trainer.data.prepare import prepare_data\n"
        "from decoct.trainer.settings import DataSettings\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "try:\n"
        "    prepare_data(DataSettings(files=(sys.argv[2],), seq_length=16, eval_tokens=128), tokenizer, Path(sys.argv[3]))\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    assert settings.files is not None
    command = [sys.executable, "-c", code, str(tmp_path / "tok"), settings.files[0], str(tmp_path / "cache")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tokenized text cannot be written" in result.stdout
    assert "free some space, or set the environment variable DECOCT_CACHE" in result.stdout
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
