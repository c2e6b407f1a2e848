import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoct.launch.run.run_folder import RunFolder, StageFolder, state_fault
from decoct.models.common.errors import UserError
from decoct.models.common.seal import sealed


def test_work_of_the_same_key_is_kept(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path / "01-distill")
    assert folder.begin("k" * 64, "distill") == {}
    (folder.path / "checkpoints").mkdir()
    assert folder.begin("k" * 64, "distill")["state"] == "running"
    assert (folder.path / "checkpoints").is_dir()


def test_work_of_another_key_is_moved_aside_and_never_overwritten(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path / "01-distill")
    for key in ("a" * 64, "b" * 64, "a" * 64, "b" * 64):
        folder.begin(key, "distill")
        (folder.path / "mark").write_text(key)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["01-distill", "01-distill.aaaaaaaa", "01-distill.aaaaaaaa-1", "01-distill.bbbbbbbb"]


def test_broken_stage_file_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path / "01-distill")
    folder.path.mkdir()
    (folder.path / "stage.json").write_text("{")
    with pytest.raises(UserError, match=r"stage\.json is not readable JSON .* delete the folder"):
        folder.begin("k", "distill")


def test_run_folder_that_cannot_be_made_is_a_readable_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="run folder"):
        RunFolder(tmp_path / "runs" / "x").open("name: x")


def test_open_writes_recipe_and_versions(tmp_path: Path) -> None:
    RunFolder(tmp_path / "x").open("name: x\n")
    assert (tmp_path / "x" / "recipe.yaml").read_text() == "name: x\n"
    assert json.loads((tmp_path / "x" / "versions.json").read_text())["packages"]["torch"]


def test_drop_checkpoints_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    StageFolder(tmp_path).drop_checkpoints(keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]
    StageFolder(tmp_path).drop_checkpoints(keep=0)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_drop_checkpoints_keeps_the_one_that_the_model_is_made_of(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    StageFolder(tmp_path).drop_checkpoints(keep=1, step=2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    StageFolder(tmp_path).drop_checkpoints(keep=0, step=2)
    assert not list((tmp_path / "checkpoints").iterdir())


def finished(folder: StageFolder, **more: object) -> None:
    folder.begin("k", "distill")
    folder.model.mkdir()
    (folder.model / "decoct.json").write_text(json.dumps({"format": 1, "files": {"w": hashlib.sha256(b"1").hexdigest()}}))
    (folder.model / "w").write_bytes(b"1")
    folder.write({"key": "k", "kind": "distill", "state": "done", "makes_model": True, "exports": [], **more})


def test_finished_stage_whose_model_was_deleted_runs_again(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path / "01-distill")
    finished(folder)
    assert folder.begin("k", "distill")["state"] == "done"
    shutil.rmtree(folder.model)
    assert folder.begin("k", "distill").get("state") != "done"


def test_finished_stage_whose_model_was_changed_is_refused(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path / "01-distill")
    finished(folder)
    (folder.model / "w").write_bytes(b"2")
    with pytest.raises(UserError, match="damaged: w has changed"):
        folder.begin("k", "distill")


def test_model_folder_of_a_start_killed_before_it_said_done_is_made_again(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path / "01-distill")
    finished(folder)
    folder.write({"key": "k", "kind": "distill", "state": "running"})
    folder.begin("k", "distill")
    assert not folder.model.exists()


DONE: dict[str, Any] = {
    "key": "a" * 64,
    "kind": "export",
    "state": "done",
    "input": "b" * 64,
    "makes_model": False,
    "tokens": 0,
    "seconds": 1.5,
    "exports": [{"format": "gguf", "path": "gguf", "bytes": 1, "exact": True, "runtimes": {"llama.cpp": {"status": "absent"}}}],
}


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[1]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000),
        *(b'{"key": 1}', b'{"key": "../../x"}', b'{"state": "done"}', b'{"exports": 1}'),
    ],
)
def test_a_damaged_stage_file_is_one_message(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_bytes(content)
    with pytest.raises(UserError, match=r"stage\.json .*delete the folder"):
        StageFolder(tmp_path).read()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(DONE)), st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.just([1]) | st.just({"a": []}))
def test_a_stage_file_with_another_value_is_read_or_refused(name: str, value: Any) -> None:
    fault = state_fault({**DONE, name: value})
    if not fault:
        state = {**DONE, name: value}
        assert isinstance(state["makes_model"], bool)
        assert all(isinstance(export["path"], str) for export in state["exports"])
    assert not state_fault(DONE)
    assert "lacks" in state_fault({key: inner for key, inner in DONE.items() if key != "exports"})


def test_a_value_inside_a_stage_file_that_changed_is_one_message_and_no_key_is_handed_on(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path)
    folder.write(DONE)
    assert folder.read() == DONE
    content = json.loads((tmp_path / "stage.json").read_text())
    content["exports"][0]["runtimes"]["llama.cpp"]["tokens_per_second"] = {"not": "a number"}
    (tmp_path / "stage.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"stage\.json has changed since it was written; delete the folder"):
        folder.read()
    # earlier versions wrote no hash
    (tmp_path / "stage.json").write_text(json.dumps(DONE))
    assert folder.read() == DONE


def test_a_remembered_row_that_changed_is_measured_again(tmp_path: Path) -> None:
    from decoct.launch.run.stored_figures import read_figures

    file, row = tmp_path / "measured.json", {"key": "k", "row": {"parameters": 1, "eval": {"perplexity": 2.0}}}
    file.write_text(json.dumps(row))
    assert read_figures(file) == row
    whole = sealed(row)
    file.write_text(json.dumps(whole))
    assert read_figures(file)["row"] == row["row"]
    file.write_text(json.dumps({**whole, "row": {"parameters": 1, "eval": {"perplexity": "two"}}}))
    assert read_figures(file) == {}


def test_a_start_that_failed_removes_the_folders_it_made_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    folder = RunFolder(tmp_path / "there/runs/deep/run")
    highest = folder.highest_missing()
    assert highest is not None
    assert highest == tmp_path / "there/runs"
    folder.open("name: x")
    assert folder.highest_missing() is None
    (folder.path / ".session/1").mkdir(parents=True)
    assert not folder.has_begun()
    lock = folder.lock(print)
    assert folder.has_begun(), "another start works in it"
    lock.release()
    (folder.path / "00-student").mkdir()
    assert folder.has_begun()
    folder.discard(highest)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    folder.open("name: x")
    (tmp_path / "there/runs/other").mkdir()
    folder.discard(highest)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "there", tmp_path / "there/runs", tmp_path / "there/runs/other"]
