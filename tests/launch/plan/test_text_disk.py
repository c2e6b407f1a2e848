"""The bound of tokenized text on disk holds for real tokenizers, and is not made up where none is known."""

from pathlib import Path

import pytest

from decoct.launch.plan.text_disk import blend_notes, tokenized_bytes
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer
from decoct.trainer.data.documents import STDLIB_BYTES
from decoct.trainer.data.prepared_data import prepare_data
from decoct.trainer.settings import DataSettings
from decoct.trainer.settings_generation import GenerateSettings
from decoct.trainer.settings_text import BlendPart


@pytest.mark.parametrize("text", ["Words of a plain text, and some more of them. ", "é\u4e2d\u6587\n\t  1234567890"])
def test_what_is_written_is_within_the_bound(text: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text * 400)
    data = DataSettings(files=(str(file),), seq_length=32, eval_tokens=64)
    bound = tokenized_bytes(data)
    assert bound is not None
    assert bound == 4 * file.stat().st_size
    # a tokenizer that knows little makes the most tokens
    tokenizer = train_tokenizer(["a"], vocab_size=260)
    made = prepare_data(data, tokenizer, tmp_path / "cache")
    assert bound / 8 < sum(path.stat().st_size for path in made.path.glob("*.tokens")) <= bound


def test_where_no_bound_is_known(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(b"")
    assert tokenized_bytes(DataSettings(files=(str(tmp_path / "rows.jsonl.gz"),))) is None
    assert tokenized_bytes(DataSettings(files=(str(tmp_path / "missing.txt"),))) is None
    assert tokenized_bytes(DataSettings(hub="somebody/text")) is None
    (tmp_path / "chats.jsonl").write_text("{}")
    assert tokenized_bytes(DataSettings(files=(str(tmp_path / "chats.jsonl"),), kind="chat")) is None


def test_text_of_known_size() -> None:
    assert tokenized_bytes(DataSettings(builtin="python-stdlib")) == 4 * STDLIB_BYTES
    assert tokenized_bytes(DataSettings(generate=GenerateSettings(tokens=1000))) == 4000


def test_a_blend_takes_what_its_parts_take_and_its_shares_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words " * 100)
    parts = [BlendPart(files=(str(tmp_path / "a.txt"),), weight=0.3), BlendPart(generate=GenerateSettings(tokens=5000), weight=0.6)]
    assert tokenized_bytes(DataSettings(blend=tuple(parts))) == 4 * 600 + 4 * 5000
    assert tokenized_bytes(DataSettings(blend=(*parts, BlendPart(hub="somebody/text", weight=1)))) is None
    assert blend_notes(DataSettings(blend=tuple(parts)), 3_000_000) == ["text: 33.3% a (1M tokens), 66.7% generated (2M tokens)"]
    assert blend_notes(DataSettings(files=("a.txt",)), 3_000_000) == []
