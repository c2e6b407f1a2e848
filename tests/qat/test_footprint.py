"""Sizes count tied tensors once, and only what a runtime reads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from decoct.models.common.errors import UserError
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import read_record
from decoct.models.folder.safetensors_read import read_header
from decoct.qat.export.export import export_folder
from decoct.qat.footprint import bits_per_weight, count_parameters, folder_bytes, linear_sparsity, packed_bytes, weight_files
from decoct.qat.layers.quantized_model import fold, prepare, quantize_model
from decoct.qat.spec import QuantSpec

Build = Callable[..., Path]
RandomModel = Callable[..., PreTrainedModel]


def test_parameters_count_tied_tensors_once(random_model: RandomModel) -> None:
    tied, untied = random_model("llama", tie_word_embeddings=True), random_model("llama", tie_word_embeddings=False)
    assert count_parameters(untied) - count_parameters(tied) == 258 * 32


def test_bytes_leave_the_codes_beside_the_weights_out(quantized_folder: Build, random_model: RandomModel) -> None:
    folder = quantized_folder()
    assert [file.name for file in weight_files(folder)] == ["model.safetensors"]
    assert folder_bytes(folder) == (folder / "model.safetensors").stat().st_size
    assert bits_per_weight(folder_bytes(folder), count_parameters(random_model("llama"))) == pytest.approx(32, rel=0.1)


def test_bytes_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no weight files"):
        folder_bytes(tmp_path)


def test_bytes_of_an_export_are_small(exported: Path, quantized_folder: Build) -> None:
    assert folder_bytes(exported) < 0.5 * folder_bytes(quantized_folder(tie_word_embeddings=True))


def test_sparsity_is_of_decoder_linears_only(random_model: RandomModel) -> None:
    model = random_model("llama")
    for name, parameter in model.named_parameters():
        if "embed" in name or "lm_head" in name:
            parameter.data.zero_()
        elif "layers" in name and parameter.ndim == 2:
            parameter.data.fill_(1.0)
            parameter.data[: parameter.shape[0] // 4] = 0
    assert linear_sparsity(model) == 0.25


def test_sparsity_of_a_prepared_model_is_that_of_what_is_stored(random_model: RandomModel) -> None:
    spec = QuantSpec(bits=4, group_size=16)
    model = random_model("llama")
    latent = linear_sparsity(model)
    prepare(model, spec)
    prepared = linear_sparsity(model)
    state = quantize_model(model, spec)
    fold(model, state)
    zeros = sum(int((codes == 0).sum()) for codes in state.codes.values())
    assert latent < prepared == linear_sparsity(model) == zeros / sum(codes.numel() for codes in state.codes.values())
    assert torch.equal(model.get_parameter("model.layers.0.self_attn.q_proj.weight")[3], torch.zeros(32))


@pytest.mark.parametrize("tied", [True, False])
def test_packed_size_is_that_of_an_export(quantized_folder: Build, tmp_path: Path, tied: bool) -> None:
    folder = quantized_folder(tie_word_embeddings=tied)
    quant = read_record(folder)["quant"]
    packed = packed_bytes(load_model(folder, dtype=torch.float32), quant)
    assert packed_bytes(load_model(folder, dtype=torch.float32), {**quant, "own_specs": None}) == packed
    out = export_folder(folder, tmp_path / "out", "compressed-tensors", runtimes=False).path
    held = sum(info.end - info.begin for file in weight_files(out) for info in read_header(file).tensors.values() if info.dtype != "I64")
    assert packed == held


def test_packed_size_of_other_lattices(random_model: RandomModel) -> None:
    model = random_model("llama", tie_word_embeddings=True)
    name = "model.layers.0.mlp.up_proj"
    rows, columns = model.get_parameter(f"{name}.weight").shape
    rest = 2 * (count_parameters(model) - rows * columns)

    def packed(**spec: object) -> int:
        return packed_bytes(model, {"spec": {"kind": "int", **QuantSpec(group_size=16).to_json(), **spec}, "modules": [name]}) - rest

    groups = columns // 16
    assert packed() == rows * columns // 2 + 2 * rows * groups
    assert packed(bits=8) == rows * columns + 2 * rows * groups
    assert packed(symmetric=False) == rows * columns // 2 + 2 * rows * groups + 4 * groups * -(-rows * 4 // 32)
    assert packed(kind="nvfp4") == rows * columns // 2 + rows * groups + 4
    assert packed(group_size="channel", scale_grid="fp32") == rows * columns // 2 + 4 * rows
