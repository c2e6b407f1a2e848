"""Tokenizing that is cut short goes on where it was, and ends in the same windows."""

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from decoct.models.common.cache_folder import cache_dir
from decoct.models.common.errors import UserError
from decoct.trainer.data import tokens, unfinished
from decoct.trainer.data.documents import Documents
from decoct.trainer.data.prepared_data import PreparedData, prepare_data
from decoct.trainer.settings import DataSettings

SETTINGS = DataSettings(files=("unused",), seq_length=16, eval_tokens=64)


@pytest.fixture(autouse=True)
def _save_after_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 200)


def told(texts: list[str], stop: int | None = None, error: BaseException | None = None) -> Documents:
    """The texts; reading them fails behind the first ``stop``."""

    def read() -> Iterator[str]:
        yield from texts[:stop]
        if stop is not None:
            raise error or KeyboardInterrupt

    return Documents("told", "0" * 64, read)


def prepared(tokenizer: PreTrainedTokenizerBase, documents: Documents, said: list[str] | None = None) -> PreparedData:
    say: Callable[[str], None] = (said if said is not None else []).append
    return prepare_data(SETTINGS, tokenizer, cache_dir(), documents=documents, say=say)


def content(data: PreparedData) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in data.path.iterdir()}


def left() -> list[str]:
    return sorted(path.name.split(".", 1)[1] for path in (cache_dir() / "tokens").iterdir())


def test_twice_cut_short_it_ends_in_the_same_windows(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DECOCT_CACHE", str(tmp_path / "plain"))
    texts = [*texts[:10], "spells <|endoftext|> here", *texts[10:30], "and <|endoftext|> here", *texts[30:], " "]
    whole = content(prepared(tokenizer, told(texts)))
    counts = prepared(tokenizer, told(texts)).left_out
    assert counts["documents that spell control tokens, which are read as control tokens (data.special_tokens)"] == 2
    assert counts["blank documents"] == 1
    monkeypatch.setenv("DECOCT_CACHE", str(tmp_path / "cut"))
    for stop in (20, 41):
        with pytest.raises(KeyboardInterrupt):
            prepared(tokenizer, told(texts, stop))
        assert left() == ["unfinished"]
        # a kill leaves more in the files than is known to be whole
        for name, more in (("stream", b"12345"), ("bounds", b"123"), ("hashes", b"123456789")):
            with next((cache_dir() / "tokens").glob("*.unfinished")).joinpath(name).open("ab") as file:
                file.write(more)
    said: list[str] = []
    assert content(prepared(tokenizer, told(texts), said)) == whole
    begun = int(said[0].split("document ")[1].split()[0])
    assert 30 <= begun <= 41, said
    assert len(list((cache_dir() / "tokens").iterdir())) == 1


@pytest.mark.parametrize("name", ["stream", "bounds", "hashes", "progress.json"])
def test_what_is_damaged_is_done_again(name: str, tokenizer: PreTrainedTokenizerBase, texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepared(tokenizer, told(texts, 30))
    file = next((cache_dir() / "tokens").glob("*.unfinished")) / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    said: list[str] = []
    data = prepared(tokenizer, told(texts), said)
    assert not said, "from the start"
    assert data.train.tokens + data.evaluation.tokens > 0


def test_a_full_disk_is_not_kept_full(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        prepared(tokenizer, told(texts, 30, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert left() == []


def test_a_second_process_does_its_own_work(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """Beside one that holds the lock, and has got somewhere, the whole entry is made without touching that."""
    with pytest.raises(KeyboardInterrupt):
        prepared(tokenizer, told(texts, 30))
    folder = next((cache_dir() / "tokens").glob("*.unfinished"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    said: list[str] = []
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        data = prepared(tokenizer, told(texts), said)
    assert not said
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in data.path.iterdir() if path.suffix) == sorted(content(data))


def test_what_nobody_came_back_for_is_removed(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    old = cache_dir() / "tokens" / ("1" * 64 + ".unfinished")
    old.mkdir(parents=True)
    (old / "progress.json").write_text("{}")
    os.utime(old / "progress.json", (0, 0))
    prepared(tokenizer, told(texts))
    assert not old.exists()


def test_who_wants_the_same_text_waits_for_the_one_that_tokenizes_it(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """Two at once, as two processes are to the lock: the text is read once, and both have the same entry."""
    begun, waiting = threading.Event(), threading.Event()
    reads, said = [], list[str]()

    def slow() -> Iterator[str]:
        reads.append(1)
        begun.set()
        assert waiting.wait(60)
        yield from texts

    def say(text: str) -> None:
        said.append(text)
        waiting.set()

    text = Documents("told", "0" * 64, slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(prepared, tokenizer, text)
        assert begun.wait(60)
        second = prepare_data(SETTINGS, tokenizer, cache_dir(), documents=text, say=say)
        assert second.path == first.result().path
    assert len(reads) == 1
    assert [line.endswith("tokenizes the same text; waiting for it") for line in said] == [True]
    assert len(list((cache_dir() / "tokens").iterdir())) == 1
