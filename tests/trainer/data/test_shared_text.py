"""Several processes encode one text: the windows of a single process, whoever encodes what, and whoever is killed."""

import copy
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from decoct.models.common.cache_folder import cache_dir
from decoct.models.common.errors import UserError
from decoct.trainer.data import encoded_text, shared_text, units
from decoct.trainer.data.encoded_text import Helpers, help_encoding
from decoct.trainer.data.prepared_data import PreparedData, prepare_data
from decoct.trainer.data.token_arrays import JoinedTokens
from decoct.trainer.processes.world import World
from decoct.trainer.settings import DataSettings

from .test_chats import TEMPLATE, talks


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 700)
    monkeypatch.setattr(shared_text, "_POLL_SECONDS", 0.01)


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tokenizer, which helpers load by any name; it has a chat template."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    monkeypatch.setattr(encoded_text, "load_tokenizer", lambda path, revision: own)
    return own


def write_text(folder: Path, texts: list[str]) -> DataSettings:
    folder.mkdir()
    rows = [{"text": text} for text in [*texts, "half \ud83d", " ", "spells <|endoftext|>", "", *texts[:5]]]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, text in enumerate(texts[:7]):
        (folder / f"b{number}.jsonl").write_text(json.dumps({"text": text * 2}) + "\n")
    return DataSettings(files=(str(folder),), seq_length=16, eval_tokens=64)


def write_talks(folder: Path) -> DataSettings:
    folder.mkdir()
    for number in range(6):
        rows = [json.dumps(row) for row in talks(60)[number::6]]
        rows += ["{not json"] * (number % 2) + [json.dumps({"text": number})] * (number == 2)
        (folder / f"{number}.jsonl").write_text("\n".join(rows))
    return DataSettings(files=(str(folder),), kind="chat", seq_length=64, eval_tokens=128)


def content(data: PreparedData) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in data.path.iterdir()}


def together(settings: DataSettings, tokenizer: Any, size: int, said: list[str] | None = None) -> PreparedData:
    """The entry, made by ``size`` processes; those but the first are threads, whose locks are as apart as those of processes."""
    say: Callable[[str], None] = (said if said is not None else []).append
    others: list[threading.Thread] = []

    def ask(folder: str) -> None:
        for rank in range(1, size):
            world = World(rank, rank, size, size)
            others.append(threading.Thread(target=help_encoding, args=(folder, settings, ("here", None), world, say)))
            others[-1].start()

    try:
        return prepare_data(settings, tokenizer, cache_dir(), helpers=Helpers(World(0, 0, size, size), ask), say=say)
    finally:
        for other in others:
            other.join()


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("packing", [True, False])
def test_the_entry_is_that_of_one_process(
    kind: str, packing: bool, load: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(write_text(tmp_path / "c", texts) if kind == "text" else write_talks(tmp_path / "c"), packing=packing)
    said: list[str] = []
    alone = prepare_data(settings, load, tmp_path / "alone", say=said.append)
    assert alone.left_out
    for size in (1, 2, 5):
        monkeypatch.setenv("DECOCT_CACHE", str(tmp_path / f"by-{size}"))
        monkeypatch.setattr(units, "UNIT_BYTES", 400 + 100 * size)
        shared = together(settings, load, size, told := [])
        assert content(shared) == content(alone)
        assert shared.path.name == alone.path.name
        assert told == said
        # nothing is left beside the entry
        assert [path.name for path in shared.path.parent.iterdir()] == [shared.fingerprint]


def count_units(monkeypatch: pytest.MonkeyPatch, *, stop: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> list[int]:
    """The numbers of the units that are encoded from here on; the one behind ``stop`` of them is cut short."""
    seen: list[int] = []
    real = shared_text.SharedText._encode

    def counting(self: Any, number: int) -> None:
        if stop is not None and len(seen) == stop:
            raise error
        real(self, number)
        seen.append(number)

    monkeypatch.setattr(shared_text.SharedText, "_encode", counting)
    return seen


def test_units_of_a_killed_start_are_not_encoded_again(
    load: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = write_text(tmp_path / "c", texts)
    alone = content(prepare_data(settings, load, tmp_path / "alone"))
    with monkeypatch.context() as patch:
        first = count_units(patch, stop=3)
        with pytest.raises(KeyboardInterrupt):
            together(settings, load, 1)
    kept = sorted(path.name for path in (cache_dir() / "tokens").rglob("0*") if path.is_dir())
    assert kept == [f"{number:05d}" for number in first] == ["00000", "00001", "00002"]
    # moved meanwhile: the hash of the text is the same
    settings = replace(settings, files=(str((tmp_path / "c").rename(tmp_path / "moved")),))
    with monkeypatch.context() as patch:
        second = count_units(patch, stop=2)
        with pytest.raises(KeyboardInterrupt):
            together(settings, load, 1)
    # damaged: it is encoded again
    damaged = next((cache_dir() / "tokens").glob("*.units")) / "00001" / "stream"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    third = count_units(monkeypatch)
    said: list[str] = []
    # alone, and without other processes
    assert content(prepare_data(settings, load, cache_dir(), say=said.append)) == alone
    assert second == [3, 4]
    assert third[0] == 1
    assert sorted(third + second + first) == sorted([*range(max(third) + 1), 1])
    assert said == [f"tokenizing continues after 4 of {max(third) + 1} parts of the text"]


@pytest.mark.parametrize("size", [1, 3])
def test_a_unit_that_cannot_be_encoded_ends_the_work_of_all(size: int, load: Any, texts: list[str], tmp_path: Path) -> None:
    settings = write_text(tmp_path / "c", texts)
    bad = tmp_path / "c" / "a.jsonl"
    bad.write_text(bad.read_text() + "{not json\n")
    with pytest.raises(UserError) as alone:
        prepare_data(settings, load, tmp_path / "alone")
    for _ in range(2):
        with pytest.raises(UserError) as shared:
            together(settings, load, size)
        assert str(shared.value) == str(alone.value)
    bad.write_text(bad.read_text().replace("{not json\n", ""))
    assert len(together(settings, load, size).train)


def test_a_process_without_the_files_leaves_them_to_rank_0(
    load: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = write_text(tmp_path / "c", texts)
    alone = content(prepare_data(settings, load, tmp_path / "alone"))
    monkeypatch.setattr(units.Piece, "is_here", lambda self: False)
    said: list[str] = []
    assert content(together(settings, load, 2, said)) == alone
    assert len(said) == 1
    assert said[0].startswith("rank 1 leaves ")
    assert said[0].endswith(" parts of the text to rank 0, because it does not have their files")


def test_a_machine_with_another_cache_or_tokenizer_is_told(
    load: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, world = write_text(tmp_path / "c", texts), World(1, 1, 2, 2)
    monkeypatch.setattr(shared_text, "SEEN_SECONDS", 0.05)
    with pytest.raises(UserError, match="is not on this machine; all ranks need the same DECOCT_CACHE folder"):
        help_encoding(str(tmp_path / "none"), settings, ("here", None), world, print)

    def ask(folder: str) -> None:
        load.add_special_tokens({"pad_token": "<|endoftext|>"})
        with pytest.raises(UserError, match="loads another tokenizer than rank 0"):
            help_encoding(folder, settings, ("here", None), world, print)

    prepare_data(settings, load, cache_dir(), helpers=Helpers(World(0, 0, 2, 2), ask))


def test_joined_arrays_are_read_as_one() -> None:
    whole = np.arange(20, dtype=np.int32)
    for cuts in ([0, 20], [0, 7, 20], [0, 0, 1, 1, 9, 20, 20]):
        joined = JoinedTokens([whole[begin:end] for begin, end in pairwise(cuts)])
        assert joined.nbytes == whole.nbytes
        for begin in range(21):
            for end in range(begin, 24):
                assert joined[begin:end].tolist() == whole[begin:end].tolist()
        assert joined[:].dtype == np.int32
    assert JoinedTokens([])[0:5].tolist() == []
