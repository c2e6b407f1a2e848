"""What can go from a run folder, and above all what cannot."""

import json
import shutil
from pathlib import Path

import pytest

from decoct.launch.upkeep.leftovers import cache_leftovers, remove, run_leftovers
from decoct.models.common.errors import UserError
from decoct.models.common.locks import Lock


def fill(folder: Path, size: int = 10) -> Path:
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(bytes(size))
    return folder


def test_checkpoints_of_done_stages_and_superseded_stages_go(finished: Path) -> None:
    shutil.rmtree(finished / "01-distill/checkpoints", ignore_errors=True)
    done = fill(finished / "01-distill/checkpoints/step-1", 30).parent
    old = Path(shutil.copytree(finished / "01-distill", finished / "01-distill.0123abcd"))
    gone = Path(shutil.copytree(finished / "01-distill", finished / "02-prune"))
    half = fill(finished / ".01-distill.host-1-0123abcd.tmp", 5)
    found = {one.path: one for one in run_leftovers(finished)}
    assert set(found) == {done, old, gone, half}
    assert found[done].bytes == 30
    assert "made again with other settings" in found[old].why
    assert "no such stage" in found[gone].why
    before = {path for path in finished.rglob("*") if path.is_file()}
    assert remove(list(found.values())) == sum(one.bytes for one in found.values())
    left = {path for path in finished.rglob("*") if path.is_file()}
    assert before - left == {path for path in before if any(path.is_relative_to(one) for one in found)}
    assert (finished / "01-distill/model/model.safetensors").is_file()
    assert not run_leftovers(finished)


def test_what_an_unfinished_stage_resumes_from_stays(finished: Path) -> None:
    shutil.rmtree(finished / "01-distill/checkpoints", ignore_errors=True)
    # the best one and the two newest
    for step in (3, 8, 9):
        fill(finished / f"01-distill/checkpoints/step-{step:08d}")
    (finished / "01-distill/stage.json").unlink()
    assert not run_leftovers(finished)


def test_what_the_report_names_stays(finished: Path) -> None:
    scale = fill(finished / ".measured/teacher-rtn-00000000/packed").parent
    old = fill(finished / ".measured/teacher-rtn-11111111/packed").parent
    report = json.loads((finished / "report.json").read_text())
    report["baselines"] = [{"name": "teacher rounded", "path": ".measured/teacher-rtn-00000000/packed"}]
    (finished / "report.json").write_text(json.dumps(report))
    assert [one.path for one in run_leftovers(finished) if one.path.parent == scale.parent] == [old]


def test_links_are_not_followed(finished: Path, tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere")
    (finished / "07-qat").symlink_to(tmp_path / "elsewhere")
    (finished / "01-distill.0123abcd").symlink_to(tmp_path / "elsewhere")
    assert not {one.path.name for one in run_leftovers(finished)} & {"07-qat", "01-distill.0123abcd"}


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no recipe\.yaml"):
        run_leftovers(tmp_path)


def test_the_cache_is_listed_but_for_what_is_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECOCT_CACHE", str(tmp_path / "cache"))
    assert not cache_leftovers()
    ready, making = fill(tmp_path / "cache/tokens/a"), fill(tmp_path / "cache/tokens/b")
    teacher = fill(tmp_path / "cache/teachers/c", 20)
    parts = fill(tmp_path / "cache/tokens/b.units")
    with Lock(making.with_name("b.making")) as lock:
        assert lock.acquire()
        assert [one.path for one in cache_leftovers()] == [teacher, ready]
    assert len(cache_leftovers()) == 4
    assert parts in {one.path for one in cache_leftovers()}
