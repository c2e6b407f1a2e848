"""Sizes count tied tensors once, and only what a runtime reads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from decoct.models.errors import UserError
from decoct.qat.footprint import bits_per_weight, count_parameters, folder_bytes, linear_sparsity, weight_files
from decoct.qat.modules import fold, prepare, quantize_model
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
