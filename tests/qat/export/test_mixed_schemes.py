"""Models with several lattices, one scale a matrix, rounded embeddings and heads: exact in every format that has a place for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from decoct.models.common.errors import UserError
from decoct.qat.export.export import export_folder
from decoct.qat.readers.gguf_model import GgufModel
from decoct.qat.readers.open import open_export
from decoct.qat.scheme import QuantScheme, SpecChange
from decoct.qat.spec import QuantSpec
from decoct.qat.verify.verify import verify_folder

Build = Callable[..., Path]
WIDE = {"intermediate_size": 64}
FOUR = QuantSpec(bits=4, group_size=32)


def exact(source: Path, target: Path, form: str) -> Any:
    """The export, after an independent reader has rebuilt every weight of the source."""
    assert export_folder(source, target, form, runtimes=False).exact
    opened = open_export(target)
    for name, tensor in load_file(source / "model.safetensors").items():
        assert np.array_equal(opened.tensor(name), tensor.numpy()), name
    assert not verify_folder(target, source=source, runtimes=False).problems
    return opened


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "awq", "gguf"])
def test_one_scale_a_matrix_is_stored_as_one_a_row(quantized_folder: Build, tmp_path: Path, form: str) -> None:
    spec = QuantSpec(bits=4, group_size="tensor")
    exact(quantized_folder("llama", spec=spec, **WIDE), tmp_path / "export", form)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "gguf"])
def test_lattices_by_name_are_exact_together(quantized_folder: Build, tmp_path: Path, form: str) -> None:
    scheme = QuantScheme(weights=FOUR, skip=("*.1.*.o_proj",), overrides={"*.down_proj": SpecChange(bits=8, group_size="channel")})
    exact(quantized_folder("qwen2", scheme=scheme, **WIDE), tmp_path / "export", form)


@pytest.mark.parametrize(("form", "grid"), [("compressed-tensors", "bf16"), ("gptq", "fp16"), ("awq", "fp16")])
def test_parts_of_a_fused_matrix_with_scales_found_differently_are_exact(
    quantized_folder: Build, tmp_path: Path, form: str, grid: Any
) -> None:
    overrides = {"*.k_proj": SpecChange(divisor="qmax"), "*.up_proj": SpecChange(scale_grid=grid)}
    exact(quantized_folder("llama", scheme=QuantScheme(weights=FOUR, overrides=overrides), **WIDE), tmp_path / "export", form)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("bits", "stored"), [(8, "Q8_0"), (4, "Q4_0")])
def test_gguf_holds_rounded_embeddings_and_heads(quantized_folder: Build, tmp_path: Path, tied: bool, bits: int, stored: str) -> None:
    head = None if tied else SpecChange(bits=8)
    scheme = QuantScheme(weights=FOUR, embedding=SpecChange(bits=bits), head=head)
    source = quantized_folder("llama", scheme=scheme, tie_word_embeddings=tied, **WIDE)
    model = exact(source, tmp_path / "export", "gguf")
    assert isinstance(model, GgufModel)
    assert model.scheme["model.embed_tokens.weight"] == stored
    assert ("output.weight" in model.file.tensors) is not tied
    assert tied or model.scheme["lm_head.weight"] == "Q8_0"
    plain = export_folder(
        quantized_folder("llama", spec=FOUR, tie_word_embeddings=tied, **WIDE), tmp_path / "plain", "gguf", runtimes=False
    )
    assert (tmp_path / "export" / "model.gguf").stat().st_size < plain.bytes - 258 * 32 // 2


def test_a_rounded_head_goes_to_formats_whose_readers_know_one(quantized_folder: Build, tmp_path: Path) -> None:
    # outputs of the head are the vocabulary: a multiple of what a word holds
    for form, bits in (("compressed-tensors", 8), ("gptq", 8), ("gptq_v2", 4)):
        scheme = QuantScheme(weights=FOUR, head=SpecChange(bits=bits))
        source = quantized_folder("llama", scheme=scheme, tie_word_embeddings=False, vocab_size=264, **WIDE)
        assert "lm_head" in exact(source, tmp_path / form, form).modules
    with pytest.raises(UserError, match=r"awq has readers that expect an unquantized head \(lm_head\)"):
        export_folder(source, tmp_path / "awq", "awq", runtimes=False)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "gptq_v2", "awq"])
def test_a_rounded_embedding_is_refused_where_readers_know_none(quantized_folder: Build, tmp_path: Path, form: str) -> None:
    source = quantized_folder("llama", scheme=QuantScheme(weights=FOUR, embedding=SpecChange(bits=4)), **WIDE)
    with pytest.raises(
        UserError, match=r"expect an unquantized embedding \(model\.embed_tokens\); leave 'embedding' out, or export to gguf"
    ):
        export_folder(source, tmp_path / "export", form, runtimes=False)
    assert not (tmp_path / "export").exists()


OTHERS = [
    QuantSpec(kind="nf4", group_size=32),
    QuantSpec(kind="fp8_e4m3", bits=8, group_size="channel"),
    QuantSpec(kind="mxfp4", group_size=32),
    QuantSpec(kind="nvfp4", group_size=16),
]
INTEGERS = ["gptq", "gptq_v2", "awq", "gguf"]


# GGUF has blocks of mxfp4
@pytest.mark.parametrize(("form", "spec"), [(form, spec) for form in INTEGERS for spec in OTHERS if (form, spec.kind) != ("gguf", "mxfp4")])
def test_other_kinds_are_refused_by_formats_of_integers(quantized_folder: Build, tmp_path: Path, form: str, spec: QuantSpec) -> None:
    source = quantized_folder("llama", spec=spec, **WIDE)
    with pytest.raises(UserError, match=f"{form} holds integer codes( and the floats mxfp4)?, not kind={spec.kind}"):
        export_folder(source, tmp_path / "export", form, runtimes=False)
    assert not (tmp_path / "export").exists()


def test_the_format_of_floats_names_its_nearest_kind(quantized_folder: Build, tmp_path: Path) -> None:
    source = quantized_folder("llama", spec=QuantSpec(kind="nf4", group_size=32), **WIDE)
    ways = "quantize with kind='nvfp4', group_size=16, or kind='int', or export to safetensors-f32"
    held = "compressed-tensors holds integer codes and the floats fp8_e4m3, mxfp4 and nvfp4, not kind=nf4"
    with pytest.raises(UserError, match=rf"{held} \(.*\); {ways}"):
        export_folder(source, tmp_path / "export", "compressed-tensors", runtimes=False)
    exact(quantized_folder("llama", spec=QuantSpec(kind="nvfp4", group_size=16), **WIDE), tmp_path / "nvfp4", "compressed-tensors")


def test_other_kinds_are_plain_models_too(quantized_folder: Build, tmp_path: Path) -> None:
    source = quantized_folder("llama", spec=QuantSpec(kind="mxfp4", group_size=32), **WIDE)
    # 4-bit floats times powers of two: bf16 holds them
    exact(source, tmp_path / "export", "safetensors")
