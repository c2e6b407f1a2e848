"""What bad input gets: one readable message that names the key or file and the remedy, exit code 2, nothing half-written."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def refused(done: Any, *words: str, code: int = 2) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("decoct: ") == 1
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.fixture
def student(small_student: Path, tmp_path: Path) -> Path:
    """A model folder to damage."""
    return shutil.copytree(small_student, tmp_path / "student")


def on_folder(tiny: dict[str, Any], folder: Path) -> dict[str, Any]:
    recipe = {key: value for key, value in tiny.items() if key != "teacher"}
    return {**recipe, "student": {"path": str(folder)}, "stages": [{"qat": {"steps": 1, "weights": {"group_size": 16}}}]}


def test_unknown_key_names_line_and_nearest(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    tiny["stages"][0] = {"distill": {"stepz": 12}}
    refused(run(tiny), "stepz", "steps", "recipe.yaml:")
    assert not (tmp_path / "runs").exists()


def test_missing_files_empty_and_short_text(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    data = tiny["data"]
    refused(run({**tiny, "data": {**data, "files": ["nowhere/*.txt"]}}), "data.files", "nowhere")
    (tmp_path / "empty.txt").write_text("")
    refused(run({**tiny, "data": {**data, "files": ["empty.txt"]}}), "empty")
    (tmp_path / "short.txt").write_text("kado lota.")
    refused(run({**tiny, "data": {**data, "files": ["short.txt"]}}), "seq_length")
    assert not (tmp_path / "runs").exists(), "the parent that the start made goes too"
    (tmp_path / "runs").mkdir()
    refused(run({**tiny, "data": {**data, "files": ["short.txt"]}}), "seq_length")
    assert list((tmp_path / "runs").iterdir()) == [], "a parent that was there stays"


def test_a_start_that_fails_on_several_ranks_leaves_no_folder(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    """As under a torchrun of the user's own, where no process of ours is left to tidy up."""
    (tmp_path / "short.txt").write_text("kado lota.")
    short = {**tiny, "data": {**tiny["data"], "files": ["short.txt"]}}
    refused(run(short, ranks=2), "seq_length")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs/tiny").mkdir(parents=True)
    refused(run(short, ranks=2), "seq_length")
    assert (tmp_path / "runs/tiny/recipe.yaml").exists(), "a folder that was there stays"


def test_group_size_that_does_not_divide(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    tiny["stages"] = [{"qat": {"steps": 1, "weights": {"group_size": 24}}}]
    refused(run(tiny), "stages.0.qat.weights.group_size: 24 does not divide the student's hidden size (32)", "use 32 or 16")
    assert not (tmp_path / "runs/tiny/01-qat/model").exists()


def test_run_folder_that_cannot_be_written(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    refused(run(tiny), "run folder")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing", "unexpected", "traversal"])
def test_damaged_weights_are_refused(damage: str, tiny: dict[str, Any], run: Any, student: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = student / "model.safetensors"
    (student / "decoct.json").unlink()  # as in a folder by others: the files themselves have to tell
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "foreign":
        file.write_bytes(struct.pack("<Q", 12) + b"not json at all")
    elif damage == "traversal":
        names = list(load_file(file))
        file.rename(tmp_path / "outside.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../../../../outside.safetensors")}
        (student / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        tensors = load_file(file)
        if damage == "missing":
            del tensors["model.layers.1.self_attn.q_proj.weight"]
        else:
            tensors["model.layers.7.surprise"] = tensors["model.norm.weight"].clone()
        save_file(tensors, file, metadata={"format": "pt"})
    word = {"truncated": "model.safetensors", "foreign": "model.safetensors", "missing": "q_proj", "unexpected": "surprise"}
    refused(run(on_folder(tiny, student)), word.get(damage, "../"))
    assert not (tmp_path / "runs/tiny/01-qat/model").exists()


def test_other_tokenizer_is_refused(tiny: dict[str, Any], run: Any, student: Path) -> None:
    tiny["teacher"]["scratch"]["vocab"] = 290
    refused(run({**tiny, "student": {"path": str(student)}, "stages": [{"distill": {"steps": 1}}]}), "token")


def test_nan_stops_before_the_step_and_keeps_the_last_checkpoint(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    tiny["stages"] = [{"distill": {"steps": 40, "checkpoint_every": 1, "learning_rate": 1e30}}]
    tiny["trainer"]["gradient_clip"] = 0
    done = run(tiny)
    refused(done, "01-distill", code=1)
    assert list((tmp_path / "runs/tiny/01-distill/checkpoints").glob("step-*"))
    assert not (tmp_path / "runs/tiny/01-distill/model").exists()


def test_debug_shows_the_traceback(tiny: dict[str, Any], run: Any) -> None:
    tiny["data"]["files"] = ["nowhere.txt"]
    assert "Traceback" in run(tiny, "--debug").stderr


def test_export_of_a_folder_without_codes_names_what_to_run(student: Path, verb: Any, tmp_path: Path) -> None:
    refused(verb("export", str(student), "--out", str(tmp_path / "served"), code=2), "qat", "quantize")
    assert not (tmp_path / "served").exists()
