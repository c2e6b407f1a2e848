"""Ternary blocks of GGUF, TQ1_0 and TQ2_0: bit for bit what was rounded, for decoct's reader and for the package gguf."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from decoct.models.common.errors import UserError
from decoct.qat.export.export import export_folder
from decoct.qat.export.gguf.ternary import pack_tq1_0, pack_tq2_0
from decoct.qat.fake_quant import dequantize, quantize
from decoct.qat.readers.gguf_model import GgufModel
from decoct.qat.readers.gguf_ternary import ternary_fields
from decoct.qat.scheme import QuantScheme, SpecChange
from decoct.qat.spec import QuantSpec
from decoct.qat.verify.verify import verify_folder

Build = Callable[..., Path]
PACK = {"TQ1_0": pack_tq1_0, "TQ2_0": pack_tq2_0}
BYTES = {"TQ1_0": 54, "TQ2_0": 66}
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}


def by_package(form: str, blocks: np.ndarray) -> np.ndarray:
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    return quants.dequantize(np.ascontiguousarray(blocks), GGMLQuantizationType[form])


@pytest.mark.parametrize("form", PACK)
@pytest.mark.parametrize("group", [256, 512, "channel"])
def test_packed_blocks_are_the_rounded_weights(form: str, group: Any) -> None:
    weight = torch.randn(7, 1024, generator=torch.Generator().manual_seed(1)) * 0.05
    weight[2] = 0
    codes, scales = quantize(weight, QuantSpec(ternary=True, group_size=group))
    assert set(codes.unique().tolist()) == {-1, 0, 1}
    blocks = PACK[form](codes.numpy(), scales.numpy())
    assert blocks.shape == (7, 4, BYTES[form])
    expected = dequantize(codes, scales).numpy()
    assert np.array_equal(by_package(form, blocks.reshape(7, -1)), expected)
    fields = ternary_fields(form, blocks.reshape(-1, BYTES[form])[:, :-2])
    assert np.array_equal(fields.reshape(codes.shape) - 1, codes.numpy())


@pytest.mark.parametrize("form", PACK)
def test_the_reader_agrees_with_the_package_about_any_bytes(form: str) -> None:
    blocks = np.random.default_rng(2).integers(0, 256, (300, BYTES[form]), dtype=np.uint8)
    # the scale 1
    blocks[:, -2:] = np.array([1], "<f2").view(np.uint8)
    assert np.array_equal(ternary_fields(form, blocks[:, :-2]) - 1, by_package(form, blocks))


@pytest.mark.parametrize("form", PACK)
def test_what_a_block_does_not_hold_is_no_block(form: str) -> None:
    codes, scales = np.zeros((2, 256), np.int8), np.ones((2, 1), np.float32)
    for given, message in (
        ((codes + np.int8(2), scales), "the block holds -1..1"),
        ((codes, scales * np.float32(1.0001)), "not exact in fp16"),
        ((codes[:, :128], scales), "128 inputs are no multiple of a block of 256"),
        ((codes, np.ones((2, 2), np.float32)), "no multiples of a block of 256"),
    ):
        with pytest.raises(ValueError, match=message):
            PACK[form](*given)


@pytest.mark.parametrize(("form", "kind"), [("gguf", "TQ2_0"), ("gguf-tq1_0", "TQ1_0"), ("gguf-q2_0", "Q2_0")])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_an_export_rebuilds_every_weight(quantized_folder: Build, tmp_path: Path, form: str, kind: str, model_type: str) -> None:
    scheme = QuantScheme(
        weights=QuantSpec(ternary=True, group_size=256),
        overrides={"*.o_proj": SpecChange(group_size=128), "*.k_proj": SpecChange(bits=8)},
        embedding=SpecChange(bits=8, group_size=32),
    )
    source, target = quantized_folder(model_type, scheme=scheme, tie_word_embeddings=True, **WIDE), tmp_path / "export"
    result = export_folder(source, target, form, runtimes=False)
    assert result.exact
    assert result.bytes == (target / "model.gguf").stat().st_size
    model, expected = GgufModel(target), load_file(source / "model.safetensors")
    assert all(np.array_equal(model.tensor(name), tensor.numpy()) for name, tensor in expected.items())
    parts = ("self_attn.q_proj", "mlp.down_proj", "self_attn.o_proj", "self_attn.k_proj")
    # groups of 128 are no whole blocks of 256
    assert [model.scheme[f"model.layers.0.{part}.weight"] for part in parts] == [kind, kind, "Q2_0" if kind == "Q2_0" else "Q4_0", "Q8_0"]
    assert model.scheme["model.embed_tokens.weight"] == "Q8_0"
    assert model.file.metadata["general.file_type"] == {"TQ1_0": 36, "TQ2_0": 37, "Q2_0": 41}[kind]
    assert not verify_folder(target, source=source, runtimes=False).problems


def test_a_changed_code_is_found(quantized_folder: Build, tmp_path: Path) -> None:
    source = quantized_folder(scheme=QuantScheme(weights=QuantSpec(ternary=True, group_size=256)), **WIDE)
    export_folder(source, tmp_path / "export", "gguf", runtimes=False)
    model = GgufModel(tmp_path / "export")
    place = next(tensor for tensor in model.file.tensors.values() if tensor.type == "TQ2_0")
    for change in (1, 3):
        raw = bytearray(model.path.read_bytes())
        raw[place.begin] ^= change
        model.path.write_bytes(raw)
        assert verify_folder(tmp_path / "export", source=source, runtimes=False).problems
        raw[place.begin] ^= change
        model.path.write_bytes(raw)


def test_the_smaller_form_is_for_ternary_weights(quantized_folder: Build, tmp_path: Path) -> None:
    for spec in (QuantSpec(bits=2, group_size=256), QuantSpec(ternary=True, group_size=128)):
        folder = quantized_folder(scheme=QuantScheme(weights=spec), **WIDE)
        with pytest.raises(UserError, match="gguf-tq1_0 is for ternary weights in groups of a multiple of 256, and there are none"):
            export_folder(folder, tmp_path / "export", "gguf-tq1_0", runtimes=False)
    # two bits hold three codes, so formats of integers hold them too
    assert export_folder(folder, tmp_path / "packed", "compressed-tensors", runtimes=False).exact
