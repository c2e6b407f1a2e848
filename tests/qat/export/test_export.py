"""Exports hold exactly what was trained, appear whole or not at all, and refuse what they cannot hold."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from decoct.models.common.errors import DecoctError, UserError
from decoct.models.common.files import sha256_file
from decoct.models.folder.loading import load_tokenizer
from decoct.models.folder.record import read_record, seal_record, write_record
from decoct.qat.export import export
from decoct.qat.export.compressed_tensors import writer as compressed_tensors
from decoct.qat.export.export import EXPORTERS, export_folder
from decoct.qat.readers.compressed_tensors import PackedFolder
from decoct.qat.source.quantized_source import ExportSource
from decoct.qat.spec import QuantSpec
from decoct.qat.verify.verify import verify_folder

Build = Callable[..., Path]
FORMAT = "compressed-tensors"
Q_PROJ = "model.layers.0.self_attn.q_proj"


def export_to(source: Path, target: Path) -> Path:
    result = export_folder(source, target, FORMAT, runtimes=False)
    assert (result.path, result.exact, result.format) == (target, True, FORMAT)
    assert result.bytes == sum(file.stat().st_size for file in target.glob("*.safetensors"))
    return target


def refused(source: Path, target: Path, message: str, error: type[Exception] = UserError) -> None:
    """The export fails with this message and leaves nothing, not even a hidden temporary."""
    before = {path: path.stat().st_mtime_ns for path in sorted(target.parent.rglob("*"))}
    with pytest.raises(error, match=message):
        export_folder(source, target, FORMAT, runtimes=False)
    assert {path: path.stat().st_mtime_ns for path in sorted(target.parent.rglob("*"))}.keys() == before.keys()


@pytest.mark.parametrize(
    ("model_type", "bits", "group_size", "skip"),
    [
        ("llama", 4, 16, ()),
        ("llama", 8, "channel", ()),
        ("llama", 2, 8, ()),
        ("qwen2", 4, "channel", ("*.down_proj",)),
        ("qwen3", 8, 16, ("*.q_proj", "*.k_proj", "*.v_proj")),
        ("mistral", 4, 4, ()),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_is_rebuilt_exactly(
    quantized_folder: Build, tmp_path: Path, model_type: str, bits: int, group_size: int | str, skip: tuple[str, ...], tied: bool
) -> None:
    source = quantized_folder(model_type, bits=bits, group_size=group_size, skip=skip, tie_word_embeddings=tied)
    target = export_to(source, tmp_path / "export")
    expected, opened = load_file(source / "model.safetensors"), PackedFolder(target)
    rebuilt = {name: opened.tensor(name) for name in opened.shapes()}
    assert rebuilt.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(rebuilt[name], tensor.numpy()), name
    # pruned weights stay zero
    assert not rebuilt[f"{Q_PROJ}.weight"][3].any()
    assert not rebuilt[f"{Q_PROJ}.weight"][5, :16].any()
    stored, config = load_file(target / "model.safetensors"), json.loads((target / "config.json").read_text())
    assert ("lm_head.weight" in stored) is not tied
    left = {f"model.layers.{layer}.{place}" for layer in range(2) for place in _matching(skip)}
    assert set(config["quantization_config"]["ignore"]) == {"lm_head"} | left
    assert not verify_folder(target, source=source, runtimes=False).problems


def _matching(skip: tuple[str, ...]) -> list[str]:
    return [{"down": "mlp"}.get(pattern[2:].removesuffix("_proj"), "self_attn") + pattern[1:] for pattern in skip]


def test_layout_is_pack_quantized(quantized_folder: Build, tmp_path: Path) -> None:
    target = export_to(quantized_folder("qwen2", bits=4, group_size=16), tmp_path / "export")
    stored, config = load_file(target / "model.safetensors"), json.loads((target / "config.json").read_text())
    assert f"{Q_PROJ}.weight" not in stored
    seen = {name.removeprefix(f"{Q_PROJ}."): (t.dtype, tuple(t.shape)) for name, t in stored.items() if name.startswith(Q_PROJ)}
    assert seen == {
        "weight_packed": (torch.int32, (32, 4)),
        "weight_scale": (torch.bfloat16, (32, 2)),
        "weight_shape": (torch.int64, (2,)),
        "bias": (torch.bfloat16, (32,)),
    }
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    quantization = config["quantization_config"]
    assert config["dtype"] == "bfloat16"
    assert "sparsity_config" not in quantization
    assert quantization["format"] == quantization["config_groups"]["group_0"]["format"] == "pack-quantized"
    weights = quantization["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["strategy"], weights["group_size"], weights["symmetric"]) == (4, "group", 16, True)


def test_config_is_accepted_by_the_compressed_tensors_package(quantized_folder: Build, tmp_path: Path) -> None:
    package = pytest.importorskip("compressed_tensors.quantization", reason="the compressed-tensors package is not installed")
    for group_size in (16, "channel"):
        target = export_to(quantized_folder(bits=8, group_size=group_size), tmp_path / f"export-{group_size}")
        parsed = package.QuantizationConfig.model_validate(json.loads((target / "config.json").read_text())["quantization_config"])
        scheme = parsed.config_groups["group_0"]
        assert parsed.ignore == ["lm_head"]
        assert scheme.weights.num_bits == 8
        assert scheme.weights.group_size == (None if group_size == "channel" else group_size)


def test_tokenizer_record_and_card_come_along(quantized_folder: Build, tmp_path: Path) -> None:
    metrics = {"teacher": {"perplexity": 7.5, "kl": 0.0}, "this model": {"perplexity": 8.25, "kl": 0.0625}}
    source = quantized_folder(record={"metrics": metrics, "base_model": "someone/some-model", "sparse": [Q_PROJ]})
    (source / "chat_template.jinja").write_text("{{ messages }}")
    target = export_to(source, tmp_path / "export")
    assert load_tokenizer(target).get_vocab() == load_tokenizer(source).get_vocab()
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (target / "generation_config.json").is_file()
    record = read_record(target)
    assert record["quant"] == read_record(source)["quant"]
    assert record["sparse"] == [Q_PROJ]
    assert set(record["export"]["weights"]) == set(load_file(source / "model.safetensors"))
    names = {file.name for file in target.iterdir()}
    assert set(record["files"]) == names - {"decoct.json"}
    assert all(sha256_file(target / name) == value for name, value in record["files"].items())
    assert "quant" not in names
    card = (target / "README.md").read_text()
    assert card.startswith("---\n")
    for part in (
        "base_model: someone/some-model",
        "int4",
        "group of 16",
        "| this model | 8.25 | 0.0625 |",
        "from_pretrained",
        "vllm serve",
    ):
        assert part in card
    for file in ("README.md", "decoct.json", "config.json", "tokenizer_config.json"):
        assert str(tmp_path) not in (target / file).read_text()


def test_local_base_model_is_named_without_its_path(quantized_folder: Build, tmp_path: Path) -> None:
    target = export_to(quantized_folder(record={"base_model": str(tmp_path / "my-teacher")}), tmp_path / "export")
    card = (target / "README.md").read_text()
    assert "| Base model | my-teacher |" in card
    assert str(tmp_path) not in card
    assert "base_model:" not in card


def test_large_models_are_cut_into_shards(quantized_folder: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = compressed_tensors.plan_shards
    monkeypatch.setattr(compressed_tensors, "plan_shards", lambda sizes: plan(sizes, limit=20_000))
    source = quantized_folder()
    target = export_to(source, tmp_path / "export")
    files = sorted(target.glob("model-*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size < 26_000 for file in files)
    assert json.loads((target / "model.safetensors.index.json").read_text())["weight_map"].keys() == {
        n for f in files for n in load_file(f)
    }
    assert not verify_folder(target, source=source, runtimes=False).problems


@pytest.mark.parametrize(("bits", "nearest"), [(3, 4), (5, 4), (6, 8), (7, 8)])
def test_other_widths_are_refused_with_the_nearest(quantized_folder: Build, tmp_path: Path, bits: int, nearest: int) -> None:
    refused(quantized_folder(bits=bits), tmp_path / "export", f"packs {bits} bits differently.*quantize with bits={nearest}, ")


def test_scales_that_bf16_does_not_hold_are_refused(quantized_folder: Build, tmp_path: Path) -> None:
    spec = QuantSpec(bits=4, group_size=16, scale_grid="fp16")
    refused(quantized_folder(spec=spec), tmp_path / "export", "stores scales in bf16, which does not hold scale_grid=fp16")


def test_unquantized_tensors_off_the_bf16_grid_are_refused(quantized_folder: Build, tmp_path: Path) -> None:
    def change(model: PreTrainedModel) -> None:
        model.get_parameter("model.norm.weight").data[3] = 1.001

    refused(quantized_folder(change=change), tmp_path / "export", "model.norm.weight has values that bf16 does not hold")


def test_a_folder_without_codes_is_refused(quantized_folder: Build, tmp_path: Path) -> None:
    source = quantized_folder()
    (source / "quant/codes.safetensors").unlink()
    refused(source, tmp_path / "export", "'qat' or 'quantize'")
    refused(tmp_path / "nowhere", tmp_path / "export", "not a model folder")


def test_a_folder_without_a_tokenizer_is_refused(quantized_folder: Build, tmp_path: Path) -> None:
    source = quantized_folder()
    (source / "tokenizer.json").unlink()
    refused(source, tmp_path / "export", "tokenizer.json is missing; it is not what was measured")
    write_record(source, read_record(source))
    refused(source, tmp_path / "export", "has no tokenizer")


def test_unknown_formats_and_existing_targets_are_refused(quantized_folder: Build, tmp_path: Path) -> None:
    source = quantized_folder()
    with pytest.raises(UserError, match="did you mean 'compressed-tensors'"):
        export_folder(source, tmp_path / "export", "compressed_tensors")
    refused(source, source, "exists already")


def _edit(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    for folder in (file.parent, file.parent.parent):
        forget_hashes(folder)


def forget_hashes(folder: Path) -> None:
    """As if the files had been written like this: what is wrong must be seen in them."""
    if not (folder / "decoct.json").exists():
        return
    record = json.loads((folder / "decoct.json").read_text())
    seal_record(folder, record | {"files": {}})


@pytest.mark.parametrize("form", ["compressed-tensors", "gguf-f32"])
def test_a_bit_that_flipped_since_the_folder_was_measured_is_found(quantized_folder: Build, tmp_path: Path, form: str) -> None:
    source = quantized_folder()
    file = source / "model.safetensors"
    tensors = load_file(file)
    # another number of the bf16 grid: nothing in the file itself looks wrong
    tensors["model.norm.weight"][0] = 0.5
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"model\.safetensors has changed since it was written"):
        export_folder(source, tmp_path / "export", form, runtimes=False)
    assert not (tmp_path / "export").exists()


def test_an_export_does_not_go_into_the_folder_it_is_made_from(quantized_folder: Build) -> None:
    source = quantized_folder()
    refused(source, source / "packed", "is inside the model folder")


def _code_out_of_range(source: Path) -> None:
    _edit(source / "quant/codes.safetensors", lambda tensors: tensors[f"{Q_PROJ}.codes"][0].fill_(8))


def _scale(value: float) -> Callable[[Path], None]:
    return lambda source: _edit(source / "quant/codes.safetensors", lambda tensors: tensors[f"{Q_PROJ}.scale"][0].fill_(value))


def _truncate(name: str) -> Callable[[Path], None]:
    return lambda source: os.truncate(source / name, (source / name).stat().st_size - 5)


def _nan_norm(source: Path) -> None:
    _edit(source / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))


def _other_config(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    write_record(source, read_record(source))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code out of range": (_code_out_of_range, "outside -8..7"),
    "NaN scale": (_scale(float("nan")), "not a positive finite number"),
    "zero scale": (_scale(0.0), "not a positive finite number"),
    "truncated codes": (_truncate("quant/codes.safetensors"), "quant/codes.safetensors"),
    "truncated weights": (_truncate("model.safetensors"), "model.safetensors"),
    "foreign file": (lambda source: (source / "model.safetensors").write_text("PK not safetensors"), "model.safetensors"),
    "NaN norm": (_nan_norm, "model.norm.weight holds NaN"),
    "another config": (_other_config, r"has shape \(258, 32\), but config.json asks for \(300, 32\)"),
    "lost tensor": (
        lambda source: _edit(source / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight")),
        "model.norm.weight is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_sources_are_refused(quantized_folder: Build, tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    source = quantized_folder()
    change(source)
    refused(source, tmp_path / "export", message)


def test_a_tied_head_that_is_stored_twice_is_written_once(quantized_folder: Build, tmp_path: Path) -> None:
    source = quantized_folder(tie_word_embeddings=True)
    _edit(source / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    target = export_to(source, tmp_path / "export")
    assert "lm_head.weight" not in load_file(target / "model.safetensors")
    _edit(source / "model.safetensors", lambda tensors: tensors["lm_head.weight"][0].fill_(1.0))
    refused(source, tmp_path / "again", "lm_head.weight is stored with values of its own, but config.json ties it")


def test_too_little_room_is_said_before_anything_is_written(
    quantized_folder: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = quantized_folder()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(source, tmp_path / "export", r"the export .*export needs [\d,]+ bytes, but .* has 1,000 bytes free")


def test_an_inexact_result_never_appears(quantized_folder: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = EXPORTERS[FORMAT]

    def write(folder: Path, source: ExportSource) -> None:
        exporter.write(folder, source)
        _edit(folder / "model.safetensors", lambda tensors: tensors[f"{Q_PROJ}.weight_packed"][0].bitwise_xor_(16))

    monkeypatch.setitem(EXPORTERS, FORMAT, dataclasses.replace(exporter, write=write))
    refused(quantized_folder(), tmp_path / "export", "not exact: .*q_proj.weight", DecoctError)


def test_a_result_that_a_runtime_computes_otherwise_never_appears(
    quantized_folder: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = {"status": "differs", "version": "transformers 0", "reason": "because"}
    monkeypatch.setattr(export, "check_runtimes", lambda folder, tokens: {"transformers": outcome})
    source = quantized_folder()
    with pytest.raises(DecoctError, match=r"transformers 0.*because"):
        export_folder(source, tmp_path / "export", FORMAT)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
