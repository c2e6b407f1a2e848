"""``student.adapter`` and ``teacher.adapter``: the run of the model that ``decoct import --adapter`` writes, and a record that says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoct.models.common.errors import UserError
from decoct.models.folder.adapted import adapted_folder
from decoct.models.folder.import_model import import_model
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import content_hash
from decoct.models.folder.record import read_record


@pytest.fixture
def adapter(small_student: Path, tmp_path: Path) -> Path:
    """An adapter of rank 2 on every q_proj of the student."""
    folder = tmp_path / "lora"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    tensors = {}
    for name, module in load_model(small_student, dtype=torch.float32).named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith("q_proj"):
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, module.in_features)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(module.out_features, 2)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def recipe_of(corpus: Path, student: dict[str, Any], teacher: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        "name": name,
        # copies, which YAML does not write as aliases
        "student": dict(student),
        "teacher": dict(teacher),
        "data": {"files": [str(corpus / "*.txt")], "seq_length": 32, "eval_tokens": 512},
        "stages": [{"distill": {"steps": 2}}],
        "trainer": {"precision": "32", "global_batch_tokens": 512},
    }


def test_a_merged_model_is_made_once_and_named_by_what_it_is_made_of(small_student: Path, adapter: Path, tmp_path: Path) -> None:
    made = adapted_folder(str(small_student), str(adapter))
    assert made.name == f"{small_student.name}-with-lora"
    import_model(str(small_student), tmp_path / "imported", adapter=adapter)
    assert content_hash(made) == content_hash(tmp_path / "imported")
    assert read_record(made)["imported"] == read_record(tmp_path / "imported")["imported"]
    moved = adapter.rename(tmp_path / "moved")
    assert adapted_folder(str(small_student), str(moved)) == made
    assert [path.name for path in made.parent.iterdir()] == [made.name]
    settings = moved / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    assert adapted_folder(str(small_student), str(moved)).parent != made.parent
    file = moved / "adapter_model.safetensors"
    save_file({name: tensor[:1].clone() if "lora_A" in name else tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"adapter_model.safetensors: .*lora_A.weight"):
        adapted_folder(str(small_student), str(moved))


@pytest.mark.slow
def test_a_run_with_adapters_is_the_run_of_merged_models(
    run: Callable[..., Any], small_student: Path, adapter: Path, corpus: Path, tmp_path: Path
) -> None:
    with_adapter = {"path": str(small_student), "adapter": str(adapter)}
    import_model(str(small_student), tmp_path / "merged", adapter=adapter)
    merged, plain = {"path": str(tmp_path / "merged")}, {"path": str(small_student)}
    keys = {}
    for name, student, teacher in (("given", with_adapter, with_adapter), ("folder", merged, merged), ("taught", plain, with_adapter)):
        done = run(recipe_of(corpus, student, teacher, name))
        assert done.returncode == 0, done.stdout + done.stderr
        keys[name] = json.loads((tmp_path / f"runs/{name}/01-distill/stage.json").read_text())["key"]
        told = "an adapter (rank 2, lora/adapter_model.safetensors, sha256 " in " ".join(done.stdout.split())
        assert told
    assert keys["given"] == keys["folder"]
    models = {name: load_file(tmp_path / f"runs/{name}/01-distill/model/model.safetensors") for name in keys}
    assert all(torch.equal(models["given"][name], models["folder"][name]) for name in models["given"])
    given, taught = (read_record(tmp_path / f"runs/{name}/01-distill/model") for name in ("given", "taught"))
    assert given["imported"]["format"] == taught["teacher_imported"]["format"] == "adapter"
    assert "teacher_imported" not in given
    assert "imported" not in taught
    assert "adapter: " in (tmp_path / "runs/given/recipe.yaml").read_text()


@pytest.mark.slow
def test_what_is_no_adapter_is_refused_before_any_work(run: Callable[..., Any], small_student: Path, corpus: Path, tmp_path: Path) -> None:
    plain = {"path": str(small_student)}
    done = run(recipe_of(corpus, {**plain, "adapter": "nowhere"}, plain, "a"))
    assert done.returncode == 2
    assert "student.adapter: nowhere is no folder; give the folder of a LoRA adapter" in " ".join(done.stderr.split())
    (tmp_path / "empty").mkdir()
    done = run(recipe_of(corpus, plain, {**plain, "adapter": "empty"}, "a"))
    assert done.returncode == 2
    assert "teacher.adapter: empty is no adapter of peft: it has no adapter_config.json" in " ".join(done.stderr.split())
    scratch = {"scratch": {"tokens": 1000}, "adapter": "empty"}
    done = run(recipe_of(corpus, {"keep": {"layers": 2}}, scratch, "a"))
    assert done.returncode == 2
    assert "adapter= is merged into the model that 'path' names; a scratch teacher has none" in " ".join(done.stderr.split())
    assert not (tmp_path / "runs").exists()
