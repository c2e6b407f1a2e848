"""MXFP4 blocks of GGUF: bit for bit what was rounded, for decoct's reader and for the package gguf."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from decoct.models.common.errors import UserError
from decoct.qat.export.export import export_folder
from decoct.qat.export.gguf.mxfp4 import pack_mxfp4
from decoct.qat.fake_quant import decode, encode
from decoct.qat.readers.gguf_model import GgufModel
from decoct.qat.readers.gguf_mxfp4 import decode_mxfp4
from decoct.qat.scheme import QuantScheme, SpecChange
from decoct.qat.spec import QuantSpec
from decoct.qat.verify.verify import verify_folder

Build = Callable[..., Path]
SPEC = QuantSpec(kind="mxfp4", group_size=32)
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 1}


def by_package(blocks: np.ndarray) -> np.ndarray:
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    with np.errstate(over="ignore"):
        return quants.dequantize(np.ascontiguousarray(blocks), GGMLQuantizationType.MXFP4)


def test_packed_blocks_are_the_rounded_weights() -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
    # scales from the smallest to the largest power
    weight *= 2.0 ** torch.tensor([-126, -60, -20, -4, 0, 20, 60, 120])[:, None]
    weight[3] = 0
    encoded = encode(weight, SPEC)
    blocks = pack_mxfp4(encoded.codes.numpy(), encoded.scales.numpy())
    assert blocks.shape == (8, 3, 17)
    expected = decode(encoded, SPEC).numpy()
    assert len(np.unique(encoded.codes)) == 15, "every code but minus zero"
    assert np.array_equal(by_package(blocks.reshape(8, -1)), expected)
    codes, scales = decode_mxfp4(blocks.reshape(-1, 17))
    assert np.array_equal((codes * scales).reshape(expected.shape), expected)


def test_the_reader_agrees_with_the_package_about_any_bytes() -> None:
    blocks = np.random.default_rng(2).integers(0, 256, (600, 17), dtype=np.uint8)
    blocks[:255, 0] = np.arange(255)
    codes, scales = decode_mxfp4(blocks)
    # 255 is NaN in the standard, and a number in the package
    usable = blocks[:, 0] != 255
    # the largest exponents times 6 are beyond fp32 for both
    with np.errstate(over="ignore"):
        assert np.array_equal((codes * scales)[usable], by_package(blocks)[usable])
    assert np.isnan(scales[~usable]).all()


def test_what_a_block_does_not_hold_is_no_block() -> None:
    codes, scales = np.zeros((2, 64), np.uint8), np.ones((2, 2), np.float32)
    for given, message in (
        ((codes + np.uint8(16), scales), "codes reach 16"),
        ((codes, scales * np.float32(1.5)), "no power of two"),
        ((codes, scales * np.float32(2.0**-128)), "no power of two from 2"),
        ((codes, -scales), "no power of two"),
        ((codes, scales[:, :1]), "are no blocks of 32"),
        ((codes[:, :48], scales), "are no blocks of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            pack_mxfp4(*given)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_an_export_rebuilds_every_weight(quantized_folder: Build, tmp_path: Path, model_type: str) -> None:
    scheme = QuantScheme(
        weights=SPEC, overrides={"*.o_proj": SpecChange(kind="int", bits=8)}, embedding=SpecChange(kind="mxfp4"), skip=("*.up_proj",)
    )
    source, target = quantized_folder(model_type, scheme=scheme, tie_word_embeddings=True, **WIDE), tmp_path / "export"
    result = export_folder(source, target, "gguf", runtimes=False)
    assert result.exact
    assert result.bytes == (target / "model.gguf").stat().st_size
    model, expected = GgufModel(target), load_file(source / "model.safetensors")
    assert all(np.array_equal(model.tensor(name), tensor.numpy()) for name, tensor in expected.items())
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    assert [model.scheme[f"model.layers.0.{part}.weight"] for part in parts] == ["MXFP4", "Q8_0", "BF16"]
    assert model.scheme["model.embed_tokens.weight"] == "MXFP4"
    assert model.file.metadata["general.file_type"] == 38
    assert not verify_folder(target, source=source, runtimes=False).problems


def test_a_changed_byte_is_found(quantized_folder: Build, tmp_path: Path) -> None:
    source = quantized_folder(scheme=QuantScheme(weights=SPEC), **WIDE)
    export_folder(source, tmp_path / "export", "gguf", runtimes=False)
    model = GgufModel(tmp_path / "export")
    place = next(tensor for tensor in model.file.tensors.values() if tensor.type == "MXFP4")
    whole = model.path.read_bytes()
    # an exponent, and the exponent of NaN
    for value, message in ((whole[place.begin] ^ 1, "is not the source's"), (255, "holds NaN or infinite values")):
        model.path.write_bytes(whole[: place.begin] + bytes([value]) + whole[place.begin + 1 :])
        assert any(message in problem for problem in verify_folder(tmp_path / "export", source=source, runtimes=False).problems)


@pytest.mark.parametrize("kind", ["nf4", "nvfp4"])
def test_other_floats_are_refused(quantized_folder: Build, tmp_path: Path, kind: Any) -> None:
    folder = quantized_folder(scheme=QuantScheme(weights=QuantSpec(kind=kind, group_size=16)), **WIDE)
    with pytest.raises(UserError, match=f"not kind={kind}"):
        export_folder(folder, tmp_path / "export", "gguf", runtimes=False)
