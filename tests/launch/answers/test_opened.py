"""Every form of one model gives the answers of that model; what cannot be read names a package or a verb."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from decoct.launch.answers.answer import Sampling, answer, prompt_ids
from decoct.launch.answers.opened import _name, open_for_answers
from decoct.models.common.errors import UserError
from decoct.models.folder.loading import load_model, load_tokenizer
from decoct.qat import QuantSpec, quantize_model, save_quantized_folder
from decoct.qat.export.export import export_folder


@pytest.fixture(scope="module")
def forms(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``quantized`` and its exports, a folder each."""
    place = tmp_path_factory.mktemp("forms")
    model = load_model(folder, dtype=torch.float32)
    state = quantize_model(model, QuantSpec(bits=2, group_size=16))
    save_quantized_folder(model, state, place / "quantized", tokenizer=load_tokenizer(folder), base_model="tiny")
    for form in ("compressed-tensors", "gptq"):
        export_folder(place / "quantized", place / form, form, runtimes=False)
    export_folder(folder, place / "gguf-f32", "gguf-f32", runtimes=False)
    return place


def said(path: Path) -> list[int]:
    opened = open_for_answers(str(path))
    return answer(opened, prompt_ids(opened, "the cat"), Sampling(max_tokens=24)).ids


def test_exports_answer_as_the_quantized_folder_does(forms: Path, folder: Path) -> None:
    quantized = said(forms / "quantized")
    assert said(forms / "compressed-tensors") == said(forms / "gptq") == quantized
    assert quantized != said(folder), "rounding to 2 bits changes this model's answer"
    assert said(forms / "gguf-f32") == said(forms / "gguf-f32/model.gguf") == said(folder)


def test_names_say_which_model_is_meant(forms: Path, folder: Path, tmp_path: Path) -> None:
    assert open_for_answers(str(folder)).name == "tiny"
    shutil.copytree(folder, tmp_path / "01-distill/model")
    assert open_for_answers(str(tmp_path / "01-distill/model")).name == "01-distill/model"


def test_bf16_halves_the_memory(folder: Path) -> None:
    opened = open_for_answers(str(folder), dtype="bf16")
    assert {parameter.dtype for parameter in opened.model.parameters()} == {torch.bfloat16}
    with pytest.raises(UserError, match="--dtype=fp8 is not one of fp32, bf16"):
        open_for_answers(str(folder), dtype="fp8")


def foreign(source: Path, target: Path, **changes: object) -> Path:
    """A copy without decoct's record, whose packing no reader of decoct knows."""
    shutil.copytree(source, target)
    (target / "decoct.json").unlink()
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_packed_weights_of_other_tools_name_the_package_that_reads_them(
    forms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = foreign(forms / "gptq", tmp_path / "other", checkpoint_format="unheard of")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"packed by gptq, and transformers needs optimum and gptqmodel .* pip install optimum gptqmodel"):
        open_for_answers(str(other))
    assert said(foreign(forms / "gptq", tmp_path / "known")) == said(forms / "quantized"), "the independent reader needs no package"


def test_a_gguf_file_alone_is_imported(forms: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # no package for GGUF is needed
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    shutil.copy(forms / "gguf-f32/model.gguf", tmp_path / "alone.gguf")
    assert said(tmp_path / "alone.gguf") == said(folder)
    (tmp_path / "alone.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="it is cut off"):
        open_for_answers(str(tmp_path / "alone.gguf"))


def test_a_damaged_export_is_not_handed_to_another_reader(forms: Path, tmp_path: Path) -> None:
    shutil.copytree(forms / "compressed-tensors", tmp_path / "damaged")
    config = json.loads((tmp_path / "damaged/config.json").read_text())
    config["hidden_size"] = 17
    (tmp_path / "damaged/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"damaged/config\.json has changed since it was written"):
        open_for_answers(str(tmp_path / "damaged"))


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a model folder: it has no config\.json"):
        open_for_answers(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        open_for_answers(str(tmp_path / "nowhere"))


def test_a_short_name_of_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("03-export/gguf", "run/model", "other/plain"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert [_name(name) for name in ("03-export/gguf", "run/model", "other/plain", "org/name")] == [
        "03-export/gguf", "run/model", "plain", "org/name",
    ]  # fmt: skip
    assert _name("/") == "/"
