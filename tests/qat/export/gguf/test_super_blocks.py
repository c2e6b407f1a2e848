"""Super-blocks of q2_k to q6_k in GGUF: bit for bit what was rounded, for decoct's reader and for the package gguf."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from decoct.models.common.errors import UserError
from decoct.qat.codes.state import load_quant_state
from decoct.qat.export.export import export_folder
from decoct.qat.export.gguf.super_blocks import SuperParts, pack_super
from decoct.qat.fake_quant import Encoded, decode, encode
from decoct.qat.readers.gguf_model import GgufModel
from decoct.qat.readers.gguf_super_blocks import decode_super_blocks
from decoct.qat.scheme import QuantScheme, SpecChange
from decoct.qat.spec import QuantSpec
from decoct.qat.verify.verify import verify_folder

Build = Callable[..., Path]
KINDS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
BYTES = {"q2_k": 84, "q3_k": 110, "q4_k": 144, "q5_k": 176, "q6_k": 210}
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}


def by_package(kind: str, blocks: np.ndarray) -> np.ndarray:
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    with np.errstate(invalid="ignore", over="ignore"):
        return quants.dequantize(np.ascontiguousarray(blocks), GGMLQuantizationType[kind.upper()])


def parts_of(encoded: Encoded) -> SuperParts:
    sub = encoded.sub
    assert sub is not None
    return SuperParts(
        codes=encoded.codes.numpy(),
        scales=encoded.scales.numpy(),
        sub_scales=sub.scales.numpy(),
        minimum=None if sub.minimum is None else sub.minimum.numpy(),
        sub_minimums=None if sub.minimums is None else sub.minimums.numpy(),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_packed_blocks_are_the_rounded_weights(kind: str) -> None:
    weight = torch.randn(7, 768, generator=torch.Generator().manual_seed(1)) * 0.05
    weight[1], weight[2], weight[3] = weight[1].abs(), -weight[2].abs(), 0
    spec = QuantSpec(kind=kind)  # pyright: ignore[reportArgumentType]
    encoded = encode(weight, spec)
    blocks = pack_super(kind, parts_of(encoded))
    assert blocks.shape == (7, 3, BYTES[kind])
    expected = decode(encoded, spec).numpy()
    ours = decode_super_blocks(kind.upper(), blocks.reshape(-1, BYTES[kind]))
    assert np.array_equal(ours.values.reshape(expected.shape), expected)
    assert np.array_equal(ours.codes.reshape(expected.shape), encoded.codes.numpy())
    assert np.array_equal(by_package(kind, blocks.reshape(7, -1)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reader_agrees_with_the_package_about_any_bytes(kind: str) -> None:
    blocks = np.random.default_rng(2).integers(0, 256, (400, BYTES[kind]), dtype=np.uint8)
    theirs = by_package(kind, blocks)
    ours = decode_super_blocks(kind.upper(), blocks).values
    usable = np.isfinite(theirs)
    assert usable.mean() > 0.8
    assert np.array_equal(ours[usable], theirs[usable])
    assert not np.isfinite(ours[~usable]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_a_block_shows(kind: str) -> None:
    """In the values, or where every code is zero at least in the other numbers, which have a hash of their own."""
    weight = torch.randn(1, 256, generator=torch.Generator().manual_seed(3)) * 0.05
    block = pack_super(kind, parts_of(encode(weight, QuantSpec(kind=kind)))).reshape(1, -1)  # pyright: ignore[reportArgumentType]
    before = decode_super_blocks(kind.upper(), block)
    for bit in range(8 * BYTES[kind]):
        damaged = block.copy()
        damaged[0, bit // 8] ^= np.uint8(1 << bit % 8)
        after = decode_super_blocks(kind.upper(), damaged)
        same = np.array_equal(before.values, after.values) and np.array_equal(before.numbers, after.numbers)
        assert not same, f"bit {bit}"


def test_numbers_out_of_range_are_no_blocks() -> None:
    sound = parts_of(encode(torch.randn(2, 256), QuantSpec(kind="q4_k")))
    for name, values, message in (
        ("codes", sound.codes + 1, "the block holds 0..15"),
        ("sub_scales", sound.sub_scales + 64, "the block holds 0..63"),
        ("sub_minimums", sound.sub_scales - 64, "the block holds 0..63"),
        ("scales", sound.scales * np.float32(1.0001), "not exact in fp16"),
        ("minimum", sound.scales[:1], "missing"),
    ):
        with pytest.raises(ValueError, match=message):
            pack_super("q4_k", SuperParts(**{**sound.__dict__, name: values}))
    with pytest.raises(ValueError, match="no multiple of a block of 256"):
        pack_super("q6_k", SuperParts(codes=sound.codes[:, :128], scales=sound.scales, sub_scales=sound.sub_scales))


SCHEMES = {
    **{kind: QuantScheme(weights=QuantSpec(kind=kind)) for kind in KINDS},  # pyright: ignore[reportArgumentType]
    "mixed": QuantScheme(
        weights=QuantSpec(kind="q4_k"),
        overrides={"*.v_proj": SpecChange(kind="q6_k"), "*.o_proj": SpecChange(kind="int", bits=5, group_size=32)},
        embedding=SpecChange(kind="q6_k"),
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_an_export_rebuilds_every_weight(quantized_folder: Build, tmp_path: Path, name: str, model_type: str) -> None:
    source = quantized_folder(model_type, scheme=SCHEMES[name], tie_word_embeddings=True, **WIDE)
    target = tmp_path / "export"
    result = export_folder(source, target, "gguf", runtimes=False)
    assert result.exact
    assert result.bytes == (target / "model.gguf").stat().st_size
    expected, model = load_file(source / "model.safetensors"), GgufModel(target)
    for module, tensor in expected.items():
        assert np.array_equal(model.tensor(module), tensor.numpy()), module
    types = {model.scheme[f"{module}.weight"] for module in model.modules}
    assert types == ({name.upper()} if name in KINDS else {"Q4_K", "Q5_0", "Q6_K"})
    if name == "mixed":
        assert model.scheme["model.embed_tokens.weight"] == "Q6_K"
    assert not verify_folder(target, source=source, runtimes=False).problems


@pytest.mark.parametrize("tied", [True, False])
def test_a_mixture_has_the_types_and_the_name_of_llama_cpps(quantized_folder: Build, tmp_path: Path, tied: bool) -> None:
    """With an FFN of 288 channels, for which no super-block exists."""
    scheme = QuantScheme(weights=QuantSpec(kind="q4_k"), mix="q4_k_m")
    sizes = WIDE | {"num_hidden_layers": 8, "intermediate_size": 288}
    source, target = quantized_folder(scheme=scheme, tie_word_embeddings=tied, **sizes), tmp_path / "export"
    assert export_folder(source, target, "gguf", runtimes=False).exact
    model, expected = GgufModel(target), load_file(source / "model.safetensors")
    assert all(np.array_equal(model.tensor(name), tensor.numpy()) for name, tensor in expected.items())
    for layer, types in ((2, ["Q4_K", "Q5_0"]), (3, ["Q6_K", "Q8_0"]), (7, ["Q6_K", "Q8_0"])):
        parts = ("self_attn.v_proj", "mlp.down_proj")
        assert [model.scheme[f"model.layers.{layer}.{part}.weight"] for part in parts] == types
    assert model.scheme["model.embed_tokens.weight"] == ("Q6_K" if tied else "Q4_K")
    assert tied or model.scheme["lm_head.weight"] == "Q6_K"
    # 15 is llama.cpp's number of Q4_K_M
    assert model.file.metadata["general.file_type"] == 15
    assert not verify_folder(target, source=source, runtimes=False).problems


@pytest.mark.parametrize("kind", ["q4_k", "q6_k"])
def test_the_folder_holds_codes_and_sub_scales(quantized_folder: Build, kind: str) -> None:
    folder = quantized_folder(scheme=QuantScheme(weights=QuantSpec(kind=kind)), **WIDE)  # pyright: ignore[reportArgumentType]
    tensors = load_file(folder / "quant/codes.safetensors")
    suffixes = {name.rpartition(".")[2] for name in tensors}
    assert suffixes == {"codes", "scale", "sub_scale"} | ({"minimum_scale", "sub_minimum"} if kind == "q4_k" else set())
    state = load_quant_state(folder)
    renamed = state.renamed({state.modules[0]: "other"})
    assert torch.equal(renamed.dequantized("other"), state.dequantized(state.modules[0]))
    # without its sub-scales the folder is not whole
    from safetensors.torch import save_file

    save_file({name: one for name, one in tensors.items() if not name.endswith("q_proj.sub_scale")}, folder / "quant/codes.safetensors")
    with pytest.raises(UserError, match=r"q_proj\.sub_scale is missing"):
        load_quant_state(folder)


def test_other_formats_name_the_one_that_holds_them(quantized_folder: Build, tmp_path: Path) -> None:
    folder = quantized_folder(scheme=SCHEMES["q4_k"], **WIDE)
    for form in ("compressed-tensors", "gptq", "gptq_v2", "awq"):
        with pytest.raises(UserError, match=r"has no super-blocks, which kind=q4_k needs .*; export to gguf"):
            export_folder(folder, tmp_path / form, form, runtimes=False)
    assert export_folder(folder, tmp_path / "f32", "safetensors-f32", runtimes=False).exact
