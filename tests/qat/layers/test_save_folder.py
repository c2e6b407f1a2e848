"""From a loop of one's own to a folder that every verb takes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from decoct.models.common.errors import UserError
from decoct.qat.export.export import export_folder
from decoct.qat.layers.quantized_model import fold, prepare, quantize_model
from decoct.qat.layers.save_folder import save_quantized_folder
from decoct.qat.spec import QuantSpec
from decoct.qat.verify.verify import verify_folder

Make = Callable[..., PreTrainedModel]
SPEC = QuantSpec(bits=4, group_size=16)
TOKENS = torch.arange(24)[None]


@pytest.mark.parametrize("folded", [True, False])
def test_a_trained_student_is_saved_exported_and_computes_the_same(
    random_model: Make, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, folded: bool
) -> None:
    model: Any = random_model("llama")
    prepare(model, SPEC)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.001)  # off the bf16 grid, as training leaves it
    state = quantize_model(model, SPEC)
    if folded:
        fold(model, state)
    folder = save_quantized_folder(model, state, tmp_path / "student", tokenizer=tokenizer, base_model="someone/some-model")
    again: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert verify_folder(folder, runtimes=False).ok
    made = export_folder(folder, tmp_path / "served", "compressed-tensors", runtimes=False)
    assert made.exact
    assert "someone/some-model" in (made.path / "README.md").read_text()
    assert verify_folder(made.path, source=folder, runtimes=False).ok


def test_a_state_of_another_model_is_refused_and_leaves_nothing(
    random_model: Make, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    state = quantize_model(prepare_and_return(random_model("llama")), SPEC)
    other = random_model("llama", intermediate_size=32)
    with pytest.raises(UserError, match="they are another model's"):
        save_quantized_folder(other, state, tmp_path / "student", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def prepare_and_return(model: PreTrainedModel) -> PreTrainedModel:
    prepare(model, SPEC)
    return model


def test_without_a_tokenizer_the_folder_is_whole_and_an_export_asks_for_one(random_model: Make, tmp_path: Path) -> None:
    model = random_model("qwen3")
    folder = save_quantized_folder(model, quantize_model(model, SPEC), tmp_path / "student", record={"kind": "qat"})
    assert json.loads((folder / "decoct.json").read_text())["kind"] == "qat"
    with pytest.raises(UserError, match="has no tokenizer"):
        export_folder(folder, tmp_path / "served", "compressed-tensors", runtimes=False)
