"""Verify finds every change of an export, also when the file's own hash was renewed, and reads exports by others."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from decoct.models.common.errors import UserError
from decoct.models.folder.record import write_record
from decoct.models.folder.safetensors_read import read_header
from decoct.qat.export.export import export_folder
from decoct.qat.verify.verify import VerifyReport, verify_folder

Build = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def renew_hashes(folder: Path) -> None:
    """Write the files' present hashes into the record, as a tool that rewrites files would."""
    record = json.loads((folder / "decoct.json").read_text())
    write_record(folder, record)


def verify(folder: Path, source: Path | None = None) -> VerifyReport:
    return verify_folder(folder, source=source, runtimes=False)


def flip(file: Path, offset: int, bits: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= bits
    file.write_bytes(data)


def test_a_sound_export_passes_every_check(quantized_folder: Build, tmp_path: Path) -> None:
    source = quantized_folder()
    export_folder(source, tmp_path / "export", "compressed-tensors", runtimes=False)
    report = verify(tmp_path / "export", source)
    assert report.ok
    assert not report.problems
    assert [
        part
        for part in ("sha256", "independent reader", "those of config.json", "element by element")
        if part not in " ".join(report.checks)
    ] == []


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape", "embed_tokens.weight", "norm.weight"])
@pytest.mark.parametrize("renewed", [False, True])
def test_any_single_flipped_nibble_is_found(exported: Path, part: str, renewed: bool) -> None:
    file = exported / "model.safetensors"
    header, whole = read_header(file), file.read_bytes()
    places = [info for name, info in header.tensors.items() if name.endswith(part)]
    chosen = random.Random(f"{part} {renewed}")
    for _ in range(25):
        info = chosen.choice(places)
        offset = header.data_start + chosen.randrange(info.begin, info.end)
        bits = chosen.randrange(1, 16) << chosen.choice((0, 4))
        flip(file, offset, bits)
        if renewed:
            renew_hashes(exported)
        problems = verify(exported).problems
        assert problems, f"{part}: byte {offset} ^ {bits:#x} was not found"
        assert ("has changed since" in " ".join(problems)) is not renewed
        file.write_bytes(whole)
    renew_hashes(exported)
    assert verify(exported).ok


def test_every_single_bit_of_small_tensors_is_found(exported: Path) -> None:
    file = exported / "model.safetensors"
    header, whole = read_header(file), file.read_bytes()
    # row 3 of the first query projection is all zeros: its scales show in no weight
    info = header.tensors[f"{Q_PROJ}.weight_scale"]
    begin = header.data_start + info.begin + 3 * 4
    for bit in range(4 * 8):
        flip(file, begin + bit // 8, 1 << bit % 8)
        renew_hashes(exported)
        assert verify(exported).problems, f"bit {bit}"
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "README.md", "generation_config.json"])
def test_a_missing_or_cut_file_is_found(exported: Path, name: str) -> None:
    file = exported / name
    os.truncate(file, file.stat().st_size - 1)
    assert any(name in problem for problem in verify(exported).problems)
    file.unlink()
    assert any(name in problem for problem in verify(exported).problems)


def test_a_cut_weight_file_is_found_without_its_hash(exported: Path) -> None:
    file = exported / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    renew_hashes(exported)
    assert any("model.safetensors" in problem for problem in verify(exported).problems)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 8}, "weight_packed is I32"),
        ({"group_size": 8}, "weight_scale is BF16"),
        ({"strategy": "channel"}, "weight_scale is BF16"),
        ({"symmetric": False}, "weight_zero_point is missing"),
    ],
)
def test_an_edited_scheme_is_found(exported: Path, change: dict[str, object], message: str) -> None:
    config = json.loads((exported / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(change)
    (exported / "config.json").write_text(json.dumps(config))
    assert "config.json has changed" in " ".join(verify(exported).problems)
    renew_hashes(exported)
    assert message in " ".join(verify(exported).problems)


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_symmetry_is_compared_where_the_config_states_it(quantized_folder: Build, tmp_path: Path, form: str) -> None:
    target = export_folder(quantized_folder(group_size=32, intermediate_size=64), tmp_path / "export", form, runtimes=False).path
    assert verify(target).problems == []
    if form == "awq":
        return
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["sym"] = False
    (target / "config.json").write_text(json.dumps(config))
    renew_hashes(target)
    (problem,) = verify(target).problems
    assert "symmetric=false for model.layers.0" in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(hidden_size=64), "but config.json asks for"),
        (lambda config: config.update(num_hidden_layers=3), "is missing"),
        (lambda config: config.update(num_hidden_layers=1), "is unexpected"),
        (lambda config: config.update(tie_word_embeddings=False), "lm_head.weight is missing"),
        (lambda config: config["quantization_config"].update(ignore=[]), "lm_head is not packed"),
        (lambda config: config["quantization_config"]["ignore"].append(Q_PROJ), "q_proj is packed, but"),
    ],
)
def test_an_edited_config_is_found_without_its_hash(exported: Path, change: Callable[[dict[str, object]], None], message: str) -> None:
    config = json.loads((exported / "config.json").read_text())
    change(config)
    (exported / "config.json").write_text(json.dumps(config))
    renew_hashes(exported)
    assert message in " ".join(verify(exported).problems)


def test_a_broken_record_or_config_is_a_problem_not_a_crash(exported: Path) -> None:
    (exported / "decoct.json").write_text("{")
    assert any("decoct.json" in problem for problem in verify(exported).problems)
    (exported / "config.json").write_text("{")
    assert any("config.json" in problem for problem in verify(exported).problems)


def test_weights_are_compared_with_another_source(exported: Path, quantized_folder: Build) -> None:
    other = quantized_folder(tie_word_embeddings=True, group_size=8)
    problems = verify(exported, other).problems
    assert any("is not the source's" in problem for problem in problems)


def test_an_export_by_others_is_checked_as_far_as_it_goes(exported: Path) -> None:
    (exported / "decoct.json").unlink()
    report = verify(exported)
    assert report.ok
    assert "no recorded hash to compare with" in report.checks[0]
    tensors = load_file(exported / "model.safetensors")
    tensors[f"{Q_PROJ}.weight_scale"][0, 0] = float("nan")
    save_file(tensors, exported / "model.safetensors")
    assert "not finite and positive" in " ".join(verify(exported).problems)


def test_a_quantized_folder_is_verified_too(quantized_folder: Build) -> None:
    folder = quantized_folder()
    assert verify(folder).ok
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q_PROJ}.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    renew_hashes(folder)
    assert "not codes * scales" in " ".join(verify(folder).problems)
    with pytest.raises(UserError, match="is not an export"):
        verify(folder, folder)


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no such file: .*nowhere\.gguf"):
        verify(tmp_path / "nowhere.gguf")


def test_runtimes_are_not_asked_about_a_damaged_export(exported: Path) -> None:
    flip(exported / "model.safetensors", -1, 1)
    report = verify_folder(exported)
    assert report.problems
    assert report.runtimes == {}


@pytest.mark.slow
@pytest.mark.usefixtures("warm_judges")
def test_verify_reports_what_transformers_computes(exported: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")
    report = verify_folder(exported)
    assert report.ok
    assert report.runtimes["transformers"]["status"] == "agrees"
    assert "computes the same logits" in report.checks[-1]
