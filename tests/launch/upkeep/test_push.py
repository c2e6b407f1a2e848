"""What is uploaded, what is refused, and what the hub's client is asked to do."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from decoct.launch.upkeep.push import check_card, plan_upload, upload, visibility
from decoct.models.common.errors import UserError


def answered(status: int) -> Any:
    """As much of an HTTP answer as the errors of the hub's client look at."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.fixture
def folder(small_student: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_student, tmp_path / "student"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the hub: ``repositories`` (name -> private), ``commits``, ``refusal`` (an error to raise)."""
    state = SimpleNamespace(repositories={}, commits=[], refusal=None)

    class Api:
        def model_info(self, name: str) -> Any:
            if state.refusal:
                raise state.refusal
            if name not in state.repositories:
                raise RepositoryNotFoundError("404", response=answered(404))
            return SimpleNamespace(private=state.repositories[name])

        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
            assert exist_ok
            state.repositories.setdefault(name, private)
            return f"https://hub/{name}"

        def create_commit(self, name: str, operations: Any, *, commit_message: str) -> None:
            if state.refusal:
                raise state.refusal
            read = {one.path_in_repo: one.path_or_fileobj for one in operations}
            content = {path: what if isinstance(what, bytes) else Path(what).read_bytes() for path, what in read.items()}
            state.commits.append((name, content, commit_message))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return state


def test_every_file_of_the_record_goes_up_in_one_commit(folder: Path, hub: Any) -> None:
    planned = plan_upload(folder, "me/student")
    recorded = json.loads((folder / "decoct.json").read_text())["files"]
    assert set(planned.files) == {*recorded, "decoct.json", "README.md"}
    assert upload(planned, private=True, message="first") == "https://hub/me/student"
    (name, content, message), *more = hub.commits
    assert (name, message, more) == ("me/student", "first", [])
    assert {path: len(data) for path, data in content.items()} == planned.files
    for path, data in content.items():
        assert path == "README.md" or data == (folder / path).read_bytes()
    assert hub.repositories == {"me/student": True}


def test_a_folder_without_a_card_gets_one_that_the_hub_takes(folder: Path) -> None:
    planned = plan_upload(folder, "me/student")
    assert planned.card is not None
    import yaml

    head = yaml.safe_load(planned.card.split("---")[1])
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["decoct", "llama"]}
    assert planned.notes == [
        "README.md has no license, so nobody knows what they may do with it",
        "README.md has no base_model, so the hub shows no origin",
    ]
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\nmine")
    planned = plan_upload(folder, "me/student")
    assert (planned.card, planned.notes) == (None, [])


def test_a_folder_without_a_record_sends_what_a_model_needs(folder: Path) -> None:
    (folder / "decoct.json").unlink()
    (folder / "notes.bin").write_bytes(b"private")
    planned = plan_upload(folder, "me/student")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(planned.files)
    assert "notes.bin" not in planned.files


def test_what_is_not_whole_is_refused(folder: Path, tmp_path: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"is not what was written: model\.safetensors has changed"):
        plan_upload(folder, "me/student")
    with pytest.raises(UserError, match="is not a model folder"):
        plan_upload(tmp_path, "me/student")
    with pytest.raises(UserError, match="there is no folder"):
        plan_upload(tmp_path / "nowhere", "me/student")
    for name in ("student", "a/b/c", "me/st udent", "me/../x", "me/a--b"):
        with pytest.raises(UserError, match="is no name on the hub; write OWNER/NAME"):
            plan_upload(folder, name)


def test_a_stage_that_has_not_finished_is_refused(small_student: Path, tmp_path: Path) -> None:
    stage = Path(shutil.copytree(small_student.parent, tmp_path / "01-distill"))
    assert plan_upload(stage / "model", "me/x")
    from decoct.launch.run.run_folder import StageFolder

    state = StageFolder(stage).read()
    StageFolder(stage).write({**state, "state": "running"})
    with pytest.raises(UserError, match="has not finished"):
        plan_upload(stage / "model", "me/x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("---\ntags: [a\n---\n", "its metadata is not YAML"),
        ("---\n- a\n---\n", "must be lines of key: value"),
        ("---\ntags: decoct\n---\n", "tags in its metadata is 'decoct'; write a list"),
        ("---\nlicense: [mit]\n---\n", "write text"),
    ],
)
def test_metadata_that_the_hub_would_refuse(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_card(text, "README.md")


def test_who_may_see_it_and_what_the_hub_refuses(folder: Path, hub: Any) -> None:
    assert visibility("me/student") is None
    hub.repositories["me/student"] = False
    assert visibility("me/student") == "public"
    hub.refusal = HfHubHTTPError("no", response=answered(403))
    for ask in (lambda: visibility("me/student"), lambda: upload(plan_upload(folder, "me/student"), private=True, message="x")):
        with pytest.raises(UserError, match="log in with 'hf auth login'"):
            ask()
    hub.refusal = ConnectionError("no route")
    with pytest.raises(UserError, match=r"ConnectionError: no route\. Nothing half-uploaded is visible"):
        visibility("me/student")
