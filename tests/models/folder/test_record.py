"""Whoever opens a folder with a record finds what was changed in it: files by size and sha256, the record by a hash of itself."""

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.models.common.errors import UserError
from decoct.models.common.seal import SEAL
from decoct.models.folder.loading import load_config, load_model, load_tokenizer
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.folder.record import RECORD, accept_changes, check_record, read_record, seal_record, verify_folder_files
from decoct.models.folder.streaming import can_stream
from decoct.models.folder.weights import WeightFiles
from decoct.models.teachers import load_teacher
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

DOORS: dict[str, Callable[[Path], Any]] = {
    "load_model": lambda folder: load_model(folder, dtype=torch.float32),
    "load_tokenizer": load_tokenizer,
    "load_config": load_config,
    "can_stream": can_stream,
    "WeightFiles": WeightFiles,
    "load_teacher": load_teacher,
}
ALL = {"load_model", "can_stream", "WeightFiles", "load_teacher"}
"""Those that read weights."""


@pytest.fixture
def folder(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(["hello world"], 257)
    record = {"sparse": ["a"], "parent": "0" * 64, "kind": "distill"}
    return save_model_folder(tmp_path / "model", tiny_model("llama", vocab_size=257), tokenizer, record, dtype=torch.float32)


def flip(file: Path, at: int | None = None, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1 << bit
    file.write_bytes(data)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_every_door_finds_a_flipped_bit(folder: Path, door: str, name: str) -> None:
    DOORS[door](folder)
    flip(folder / name, -1 if name == "model.safetensors" else None)
    if name == "model.safetensors" and door not in ALL:
        DOORS[door](folder)  # reads no weight
        return
    with pytest.raises(UserError, match=f"{name}.*(has changed since it was written|not readable JSON)"):
        DOORS[door](folder)


def test_a_cut_weight_file_is_seen_by_who_reads_the_config_alone(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors has changed since it was written \(\S+ bytes instead of"):
        load_config(folder)


def test_every_flipped_bit_of_the_record_is_found_or_changes_nothing(folder: Path) -> None:
    file = folder / RECORD
    whole, content = file.read_bytes(), read_record(folder)
    chosen = random.Random(0)
    seal_at = whole.index(SEAL.encode())
    places = [chosen.randrange(len(whole)) for _ in range(600)] + list(range(seal_at - 1, len(whole)))
    unnoticed = []
    for at in places:
        flip(file, at, chosen.randrange(8))
        with suppress(UserError):
            unnoticed.append((at, read_record(folder)))
        file.write_bytes(whole)
    assert len(unnoticed) < 0.3 * len(places)
    assert [at for at, read in unnoticed if read != content] == []  # what is left are blanks between entries


def test_records_of_earlier_versions_still_load(folder: Path) -> None:
    record = json.loads((folder / RECORD).read_text())
    for key in (SEAL, "sizes"):
        record.pop(key)
        (folder / RECORD).write_text(json.dumps({key: value for key, value in record.items() if key != SEAL}))
        load_model(folder, dtype=torch.float32)
    flip(folder / "model.safetensors", -1)
    with pytest.raises(UserError, match="sha256 differs"):
        load_model(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    "entry",
    [{"files": []}, {"quant": 5}, {"export": {"weights": 5}}, {"export": {"scales": "x"}}, {"files": {"a\x1b[2J": ""}}],
)
def test_a_record_of_other_types_is_refused(folder: Path, entry: dict[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps({"format": 1, **entry}))
    with pytest.raises(UserError, match="is not a record that decoct wrote"):
        read_record(folder)


def test_a_readme_may_be_edited_and_files_may_be_added(folder: Path) -> None:
    (folder / "README.md").write_text("a model")
    shutil.copy(folder / "tokenizer.json", folder / "chat_template.jinja")
    check_record(folder)
    [problem] = verify_folder_files(folder)
    assert problem.startswith("chat_template.jinja was added after the folder was written (a change of your own: ")
    assert f"decoct verify {folder} --accept chat_template.jinja" in problem
    accept_changes(folder, ["chat_template.jinja"])
    assert verify_folder_files(folder) == []
    (folder / "chat_template.jinja").write_text("other")
    with pytest.raises(UserError, match="has changed"):
        check_record(folder)


def test_the_first_process_of_a_machine_looks_for_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(folder / "model.safetensors", -1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_record(folder)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="has changed"):
        check_record(folder)


def test_a_change_that_was_meant_is_recorded(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": 1}))
    with pytest.raises(UserError, match=r"decoct verify \S+ --accept config\.json"):
        load_config(folder)
    accept_changes(folder, ["config.json"])
    assert load_config(folder).eos_token_id == 1
    assert verify_folder_files(folder) == []
    record = read_record(folder)
    (folder / RECORD).write_text(json.dumps({**record, "sparse": []}))
    with pytest.raises(UserError, match=rf"decoct verify \S+ --accept {RECORD}"):
        load_config(folder)
    with pytest.raises(UserError, match="is not what decoct wrote"):
        accept_changes(folder, ["config.json"])
    accept_changes(folder, [RECORD])
    assert read_record(folder)["sparse"] == []


def test_weights_are_not_accepted(folder: Path) -> None:
    with pytest.raises(UserError, match="holds weights"):
        accept_changes(folder, ["model.safetensors"])
    with pytest.raises(UserError, match="is not a file that"):
        accept_changes(folder, ["../other"])
    (folder.parent / "other").write_text("beside it")
    with pytest.raises(UserError, match="is not a file that"):
        accept_changes(folder, ["../other"])


def test_a_record_can_be_written_by_hand(tmp_path: Path) -> None:
    seal_record(tmp_path, {"format": 1, "seconds": float("nan"), "pair": (1, 2.5)})
    assert {**read_record(tmp_path), SEAL: ""} == {"format": 1, "seconds": None, "pair": [1, 2.5], SEAL: ""}
