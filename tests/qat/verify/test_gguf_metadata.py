"""Verify finds every change of a GGUF export, in weights, scales and metadata, also when the file's own hash was renewed."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from decoct.models.common.errors import UserError
from decoct.models.folder.loading import load_model
from decoct.models.folder.record import write_record
from decoct.qat.export.export import export_folder
from decoct.qat.readers.gguf_model import GgufModel
from decoct.qat.rebuild import load_exported_model
from decoct.qat.runtimes import llama_cpp_check
from decoct.qat.runtimes.check import check_runtimes
from decoct.qat.spec import QuantSpec
from decoct.qat.verify.verify import verify_folder
from decoct.trainer.evaluation.model_row import is_existing_export

Build = Callable[..., Path]
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip
TOKENS = torch.randint(0, 258, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def source(quantized_folder: Build) -> Path:
    return quantized_folder(group_size=32, intermediate_size=64, rope_parameters=ROPE)


@pytest.fixture
def exported(source: Path, tmp_path: Path) -> Path:
    export_folder(source, tmp_path / "export", "gguf", runtimes=False)
    return tmp_path / "export"


def problems(folder: Path, source: Path | None = None) -> str:
    return "; ".join(verify_folder(folder, source=source, runtimes=False).problems)


def renew_hashes(folder: Path) -> None:
    record = json.loads((folder / "decoct.json").read_text())
    write_record(folder, record)


def flip(file: Path, offset: int, bits: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(offset)
        value = handle.read(1)[0] ^ bits
        handle.seek(offset)
        handle.write(bytes([value]))


def test_a_sound_export_passes(exported: Path, source: Path) -> None:
    for path in (exported, exported / "model.gguf"):
        report = verify_folder(path, source=source, runtimes=False)
        assert report.ok, report.problems
        assert "element by element" in report.checks[-1]


@pytest.mark.parametrize(
    "part", ["attn_q.weight", "ffn_down.weight", "token_embd.weight", "ffn_norm.weight", "rope_freqs.weight", "output.weight"]
)
def test_any_single_flipped_nibble_is_found(exported: Path, part: str) -> None:
    file, chosen = exported / "model.gguf", random.Random(part)
    places = [tensor for tensor in GgufModel(exported).file.tensors.values() if tensor.name.endswith(part)]
    for _ in range(12):
        tensor = chosen.choice(places)
        offset, bits = tensor.begin + chosen.randrange(tensor.nbytes), chosen.randrange(1, 16) << chosen.choice((0, 4))
        flip(file, offset, bits)
        assert "has changed since" in problems(exported)
        renew_hashes(exported)
        found = problems(exported)
        assert found, f"{tensor.name}: byte {offset - tensor.begin} ^ {bits:#x} was not found"
        assert "has changed since" not in found
        flip(file, offset, bits)
        renew_hashes(exported)
    assert not problems(exported)


@pytest.mark.parametrize(("form", "bits", "symmetric"), [("gguf", 5, True), ("gguf", 4, False), ("gguf-q2_0", 2, True)])
def test_a_flipped_nibble_of_narrow_blocks_is_found(quantized_folder: Build, tmp_path: Path, form: str, bits: int, symmetric: bool) -> None:
    """Q5_0, Q5_1 or Q4_1, Q2_0: codes, fifth bits, scales, minimums; the first bytes belong to rows of zeros too."""
    spec = QuantSpec(bits=bits, group_size=64, symmetric=symmetric)
    source = quantized_folder("qwen2", spec=spec, hidden_size=64, head_dim=16, intermediate_size=64)
    folder = export_folder(source, tmp_path / "narrow", form, runtimes=False).path
    tensor, chosen = GgufModel(folder).file.tensors["blk.0.attn_q.weight"], random.Random(form)
    for offset in (*range(6), *(chosen.randrange(tensor.nbytes) for _ in range(6))):
        change = chosen.randrange(1, 16) << chosen.choice((0, 4))
        flip(folder / "model.gguf", tensor.begin + offset, change)
        renew_hashes(folder)
        assert problems(folder), f"byte {offset} ^ {change:#x} was not found"
        flip(folder / "model.gguf", tensor.begin + offset, change)
        renew_hashes(folder)
    assert not problems(folder)


def test_every_bit_of_the_scale_of_a_zero_block_is_found(exported: Path) -> None:
    """Row 3 of the first query projection is zeros; as a pair it is row 6 of its head."""
    tensor = GgufModel(exported).file.tensors["blk.0.attn_q.weight"]
    for bit in range(16):
        flip(exported / "model.gguf", tensor.begin + 6 * 18 + bit // 8, 1 << bit % 8)
        renew_hashes(exported)
        assert problems(exported), f"bit {bit}"
        flip(exported / "model.gguf", tensor.begin + 6 * 18 + bit // 8, 1 << bit % 8)


@pytest.mark.parametrize(
    ("key", "offset", "message"),
    [
        ("llama.attention.head_count_kv", 4, "16 rows, which 3 attention heads do not divide"),
        ("llama.rope.freq_base", 6, "rope.freq_base is"),
        ("llama.attention.layer_norm_rms_epsilon", 6, "layer_norm_rms_epsilon is"),
        ("llama.context_length", 7, "context_length is"),
        ("tokenizer.ggml.eos_token_id", 4, "eos_token_id is 1"),
    ],
)
def test_changed_metadata_is_found(exported: Path, key: str, offset: int, message: str) -> None:
    file = exported / "model.gguf"
    place = file.read_bytes().index(key.encode() + b"\4" if offset in (4, 7) else key.encode() + b"\6") + len(key)
    flip(file, place + offset, 1)
    renew_hashes(exported)
    assert message in problems(exported)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_a_changed_window_of_gemma_is_found(quantized_folder: Build, tmp_path: Path, model_type: str) -> None:
    source = quantized_folder(model_type, group_size=32, intermediate_size=64, query_pre_attn_scalar=8, sliding_window=16)
    folder = export_folder(source, tmp_path / "gemma", "gguf", runtimes=False).path
    assert not problems(folder)
    key = f"{model_type.removesuffix('_text')}.attention.sliding_window".encode()
    file = folder / "model.gguf"
    # the key is followed by the type of its value, 4 bytes for u32
    flip(file, file.read_bytes().index(key) + len(key) + 4, 1)
    renew_hashes(folder)
    assert problems(folder) == "model.gguf: attention.sliding_window is 17, config.json has 16"


def test_a_changed_token_is_found(exported: Path) -> None:
    file = exported / "model.gguf"
    flip(file, file.read_bytes().index(b"<|endoftext|>") + 3, 1)
    renew_hashes(exported)
    assert "token 0 differs from" in problems(exported)


def test_a_cut_file_another_source_and_another_config_are_found(exported: Path, quantized_folder: Build) -> None:
    other = quantized_folder(group_size="channel", intermediate_size=64, rope_parameters=ROPE)
    assert "is not the source's" in problems(exported, other)
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "config.json has changed since it was written" in problems(exported)
    renew_hashes(exported)
    assert "model.layers.2.self_attn.q_proj.weight is missing" in problems(exported)
    (exported / "config.json").unlink()
    assert "config.json is missing" in problems(exported)
    os.truncate(exported / "model.gguf", 5000)
    assert "truncated" in problems(exported)


def test_a_file_alone_is_read_as_far_as_it_goes(exported: Path, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "alone" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes((exported / "model.gguf").read_bytes())
    for path in (file, file.parent):
        report = verify_folder(path, source=source)
        assert report.ok
        assert "no config.json beside the file" in " ".join(report.checks)
    with pytest.raises(UserError, match=r"config\.json"):
        load_exported_model(file)
    os.truncate(file, file.stat().st_size - 40)
    assert "truncated" in problems(file)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_rebuilt_model_is_the_fake_quant_model(quantized_folder: Build, tmp_path: Path, model_type: str, tied: bool) -> None:
    source = quantized_folder(model_type, group_size=32, intermediate_size=64, tie_word_embeddings=tied)
    export_folder(source, tmp_path / "export", "gguf", runtimes=False)
    expected, rebuilt = load_model(source, dtype=torch.float32), load_exported_model(tmp_path / "export")
    with torch.inference_mode():
        assert torch.equal(expected(input_ids=TOKENS).logits, rebuilt(input_ids=TOKENS).logits)


def test_reports_take_it_for_an_export(exported: Path, source: Path) -> None:
    assert is_existing_export(str(exported))
    assert not is_existing_export(str(source))


def test_a_runtime_that_is_not_installed_is_said_to_be(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp_check.importlib.util, "find_spec", lambda name: None)
    seen = check_runtimes(exported)
    assert seen.keys() == {"llama.cpp"}
    assert seen["llama.cpp"]["status"] == "not installed"
    assert "pip install xllamacpp" in seen["llama.cpp"]["reason"]


def test_a_runtime_that_breaks_tells_why(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp_check.importlib.util, "find_spec", lambda name: object())
    package = tmp_path / "fake" / "xllamacpp.py"
    package.parent.mkdir()
    package.write_text("raise RuntimeError('no such instruction')\n")
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    seen = check_runtimes(exported)["llama.cpp"]
    assert seen["status"] == "skipped"
    assert "it does not load the export: exit code 1: RuntimeError: no such instruction" in seen["reason"]
    assert verify_folder(exported).ok
