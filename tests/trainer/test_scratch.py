"""A scratch teacher that an earlier run left in the cache is compared with its record before it is used."""

from pathlib import Path

import pytest

from decoct.models.common.errors import UserError
from decoct.models.folder.loading import load_tokenizer
from decoct.models.settings import ScratchSettings
from decoct.trainer.data.documents import read_documents
from decoct.trainer.scratch import ScratchTeacher, check_scratch, make_tokenizer
from decoct.trainer.settings import DataSettings


def test_a_damaged_tokenizer_is_found_and_the_way_out_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world, hello tokens " * 40)
    text = read_documents(DataSettings(files=(str(tmp_path / "a.txt"),)))
    place = ScratchTeacher(tmp_path / "teacher")
    make_tokenizer(ScratchSettings(vocab=260), place, text)
    make_tokenizer(ScratchSettings(vocab=260), place, text)
    assert len(load_tokenizer(place.tokenizer)) == 260
    file = place.tokenizer / "tokenizer.json"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"delete {place.folder}, and it is made again.*tokenizer\.json has changed"):
        make_tokenizer(ScratchSettings(vocab=260), place, text)
    with pytest.raises(UserError, match=r"tokenizer\.json has changed"):
        load_tokenizer(place.tokenizer)


def test_tokenizers_of_earlier_versions_have_no_record_and_are_taken(tmp_path: Path) -> None:
    place = ScratchTeacher(tmp_path)
    place.tokenizer.mkdir()
    check_scratch(place, place.tokenizer)
