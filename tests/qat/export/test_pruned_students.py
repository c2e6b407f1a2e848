"""Students that were cut (fewer layers, narrower FFNs, zeros) through every format: exact, as small as they are, their zeros zeros."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from decoct.models.families import decoder_linears
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.pruning.magnitude import magnitude_masks
from decoct.models.pruning.shape_choice import select
from decoct.models.pruning.structured import cut
from decoct.models.student import student_by_keeping
from decoct.qat.export.export import export_folder
from decoct.qat.layers.quantized_model import fold, quantize_model
from decoct.qat.readers.open import open_export
from decoct.qat.rebuild import load_exported_model
from decoct.qat.spec import QuantSpec
from decoct.qat.verify.verify import verify_folder

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": False}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"tie_word_embeddings": True}),
]
FORMS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"bits": 4, "group_size": 32},
    "gguf": {"bits": 4, "group_size": 32},
    "gptq": {"bits": 8, "group_size": "channel"},
    "gptq_v2": {"bits": 4, "group_size": 32},
    "awq": {"bits": 4, "group_size": 16},
    "safetensors": {"bits": 2, "group_size": 16},
}
LAYERS, FFN, KEPT = 2, 64, 0.6


@pytest.fixture
def pruned(random_model: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """``pruned(model_type, **config)``: 2 of 3 layers, 64 of 96 FFN channels, six tenths of the remaining weights."""

    def make(model_type: str, **config: Any) -> PreTrainedModel:
        model, layers = student_by_keeping(random_model(model_type, num_hidden_layers=3, intermediate_size=96, **config), LAYERS)
        assert layers == [0, 2]
        text = {"input_ids": torch.randint(0, 258, (2, 32), generator=torch.Generator().manual_seed(0))}
        model = cut(model, select(model, [text], {"ffn": FFN}))
        weights = {name: module.weight for name, module in decoder_linears(model).items()}
        with torch.no_grad():
            for name, mask in magnitude_masks(weights, KEPT, "layer").items():
                weights[name].mul_(mask)
        return model

    return make


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("model_type", "config"), FAMILIES)
def test_a_pruned_student_is_exact_in_every_format(
    pruned: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    form: str,
    model_type: str,
    config: dict[str, Any],
) -> None:
    model = pruned(model_type, **config)
    zeros = {name: (module.weight == 0).numpy() for name, module in decoder_linears(model).items()}
    assert all(0.35 < where.mean() < 0.45 for where in zeros.values())
    state = quantize_model(model, QuantSpec(**FORMS[form]))
    fold(model, state)
    record = {"base_model": "someone/some-model", "kind": "quantize", "quant": state.record(), "sparse": list(zeros)}
    tensors = {"quant/codes.safetensors": state.tensors()}
    source = save_model_folder(tmp_path / "source", model, tokenizer, record, dtype=torch.float32, extra_tensors=tensors)
    target = tmp_path / form
    assert export_folder(source, target, form, runtimes=False).exact
    written = json.loads((target / "config.json").read_text())
    assert (written["num_hidden_layers"], written["intermediate_size"]) == (LAYERS, FFN)
    opened, expected = open_export(target), load_file(source / "model.safetensors")
    assert set(opened.shapes()) == set(expected)
    for name, tensor in expected.items():
        assert np.array_equal(opened.tensor(name), tensor.numpy()), name
    for module, where in zeros.items():
        assert not opened.tensor(f"{module}.weight")[where].any(), module
    report = verify_folder(target, source=source, runtimes=False)
    assert report.ok, report.problems
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(load_exported_model(target)(tokens).logits, model(tokens).logits)
