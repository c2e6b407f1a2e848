"""A GGUF file is a teacher and a student like a folder: planned from its header, imported once, named in records and cards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.configs import recipe_from_dict
from decoct.launch.plan.make_plan import plan
from decoct.models.folder.import_model import import_model
from decoct.models.folder.loading import load_model, load_tokenizer
from decoct.models.folder.record import read_record

from ...support.gguf_files import gguf_of, metadata_of, tensors_of, write_gguf


@pytest.fixture
def file(small_student: Path, tmp_path: Path) -> Path:
    """The GGUF file of a model that has been trained a little, with its own tokenizer."""
    model = load_model(small_student, dtype=torch.float32)
    return gguf_of(tmp_path / "served/teacher-f32.gguf", _made(model, tmp_path), load_tokenizer(small_student))


def _made(model: Any, tmp_path: Path) -> Any:
    (tmp_path / "served").mkdir()
    return model


def recipe_of(file: Path, corpus: Path, stages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "name": "from-gguf",
        "teacher": {"path": str(file)},
        "student": {"path": str(file)},
        "data": {"files": [str(corpus / "*.txt")], "seq_length": 32, "eval_tokens": 512},
        "stages": stages,
        "trainer": {"precision": "32", "global_batch_tokens": 512},
        **more,
    }


def test_a_plan_counts_the_exports_of_a_file(file: Path, corpus: Path) -> None:
    stages = [{"quantize": {"weights": {"bits": 8, "group_size": 32}}}, {"export": {"formats": ["compressed-tensors", "gguf"]}}]
    sizes = plan(recipe_from_dict(recipe_of(file, corpus, stages))).stages[1].exports
    assert sizes.keys() == {"compressed-tensors", "gguf"}
    # the tokenizer of the file is in its export: more than its longest tokens' bytes
    tokenizer = load_tokenizer(file)
    assert sizes["gguf"] > sum(len(token) for token in tokenizer.get_vocab())


@pytest.mark.slow
def test_a_run_from_a_file_is_the_run_from_its_folder(
    run: Callable[..., Any], file: Path, corpus: Path, tmp_path: Path, read_report: Callable[..., dict[str, Any]]
) -> None:
    stages = [
        {"distill": {"steps": 3}},
        {"quantize": {"weights": {"bits": 8, "group_size": "channel"}, "skip": ["*.down_proj"]}},
        {"export": {"formats": ["compressed-tensors"]}},
        {"evaluate": {}},
    ]
    done = run(recipe_of(file, corpus, stages))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights were stored as F32 in teacher-f32.gguf, sha256" in done.stdout.replace("\n", " ")
    cache = next(Path(tmp_path).glob("**/imports"))
    kept = sorted(cache.iterdir())
    import_model(str(file), tmp_path / "folder")
    again = run({**recipe_of(tmp_path / "folder", corpus, stages), "name": "from-folder"})
    assert again.returncode == 0, again.stdout + again.stderr
    one, two = (load_model(tmp_path / f"runs/{name}/01-distill/model", dtype=torch.float32) for name in ("from-gguf", "from-folder"))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name
    report = read_report("from-gguf")
    assert report["stages"][0]["path"] == "teacher-f32.gguf"
    assert str(tmp_path) not in json.dumps(report["stages"])
    # student and teacher are the same bytes, and measured once: even the time is the same
    assert [row["name"] for row in report["stages"][:2]] == ["teacher", "input"]
    assert report["stages"][0]["eval_seconds"] == report["stages"][1]["eval_seconds"]
    facts = read_record(tmp_path / "runs/from-gguf/01-distill/model")["imported"]
    assert (facts["file"], facts["types"]) == ("teacher-f32.gguf", {"F32": len(tensors_of(one))})
    card = next((tmp_path / "runs/from-gguf").glob("03-export/**/README.md")).read_text()
    assert f"| Imported | weights were stored as F32 in teacher-f32.gguf, sha256 {facts['sha256']} |" in card
    # the same file again: nothing is imported, every stage is skipped
    third = run(recipe_of(file, corpus, stages))
    assert third.returncode == 0 and sorted(cache.iterdir()) == kept


def test_the_plan_reads_the_header_alone(verb: Callable[..., Any], file: Path, corpus: Path, tmp_path: Path) -> None:
    import yaml

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(file, corpus, [{"distill": {"steps": 3}}])))
    # the same header, and no numbers behind it that a model could have
    with file.open("r+b") as handle:
        handle.seek(-4096, 2)
        handle.write(b"\xff" * 4096)
    said = verb("plan", "recipe.yaml").stdout
    assert "the header of" in said.replace("\n", " ") or "llama" in said
    failed = verb("run", "recipe.yaml", code=2).stderr
    assert "holds NaN or infinite numbers" in failed and "Traceback" not in failed


def test_a_file_of_another_kind_is_refused_by_plan_and_run(
    verb: Callable[..., Any], small_student: Path, corpus: Path, tmp_path: Path
) -> None:
    import yaml

    model = load_model(small_student, dtype=torch.float32)
    other = write_gguf(tmp_path / "other.gguf", "mamba9", metadata_of(model), tensors_of(model))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(other, corpus, [{"distill": {"steps": 3}}])))
    for name in ("plan", "run"):
        failed = verb(name, "recipe.yaml", code=2).stderr
        assert "cannot import the architecture 'mamba9'" in failed.replace("\n", " ") and "Traceback" not in failed
    assert not (tmp_path / "runs").exists()


def test_single_verbs_take_a_file(verb: Callable[..., Any], file: Path, corpus: Path, tmp_path: Path) -> None:
    said = verb("import", str(file), "--out", "made").stdout
    assert said.startswith("wrote made: weights were stored as F32 in teacher-f32.gguf, sha256 ")
    verb("export", str(file), "--out", "f16", "--format", "gguf-f32")
    measured = verb("evaluate", str(file), "--text", str(corpus / "*.txt"), "--seq-length", "32", "--out", "measured")
    assert measured.returncode == 0
    refused = verb("import", str(tmp_path / "made"), "--out", "again", code=2).stderr
    assert "there is nothing to import" in refused
    assert "decoct import" in verb("plain", str(file), "--out", "plain", code=2).stderr
