"""An export rebuilt by the independent reader is the fake-quant model, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoct.models.common.errors import UserError
from decoct.models.folder.loading import load_model
from decoct.models.folder.record import read_record, write_record
from decoct.qat.export.export import export_folder
from decoct.qat.rebuild import load_exported_model

Build = Callable[..., Path]
TOKENS = torch.randint(0, 258, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_rebuilt_model_equals_the_fake_quant_model(quantized_folder: Build, tmp_path: Path, model_type: str, tied: bool) -> None:
    source = quantized_folder(model_type, tie_word_embeddings=tied)
    export_folder(source, tmp_path / "export", "compressed-tensors", runtimes=False)
    expected, rebuilt = load_model(source, dtype=torch.float32), load_exported_model(tmp_path / "export")
    assert not rebuilt.training
    assert not hasattr(rebuilt.config, "quantization_config")
    assert (rebuilt.get_submodule("lm_head").weight is rebuilt.get_input_embeddings().weight) == tied
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, rebuilt.get_parameter(name)), name
    with torch.inference_mode():
        assert torch.equal(expected(input_ids=TOKENS).logits, rebuilt(input_ids=TOKENS).logits)


def test_rebuilding_refuses_weights_of_another_config(exported: Path) -> None:
    tensors = load_file(exported / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, exported / "model.safetensors")
    write_record(exported, read_record(exported))
    with pytest.raises(UserError, match=r"model\.norm\.weight is missing"):
        load_exported_model(exported)


def test_rebuilding_refuses_shapes_of_another_config(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    write_record(exported, read_record(exported))
    with pytest.raises(UserError, match=r"has shape \(\d+, \d+\), but config.json asks for"):
        load_exported_model(exported)


def test_rebuilding_refuses_an_export_that_is_not_what_was_recorded(exported: Path) -> None:
    data = bytearray((exported / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (exported / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors has changed since it was written"):
        load_exported_model(exported)
