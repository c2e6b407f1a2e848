"""Tiny quantized folders, as the qat and quantize stages write them, and exports of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from decoct.models.folder.model_folder import save_model_folder
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer
from decoct.qat.export.export import export_folder
from decoct.qat.layers.quantized_model import fold, quantize_model
from decoct.qat.scheme import QuantScheme
from decoct.qat.spec import QuantSpec

QuantizedFolder = Callable[..., Path]

_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 258,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    # large enough that every part of the network moves the logits
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["def f(x):\n    return x + 1\n"] * 4, 258)


def _random_model(model_type: str, **overrides: Any) -> PreTrainedModel:
    """Seeded random weights and biases on the bf16 grid; one row and one group of the first query projection are zeros (pruned)."""
    config = AutoConfig.for_model(model_type, **{**_CONFIG, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
            parameter.data = parameter.data.bfloat16().float()
    weight = model.get_submodule("model.layers.0.self_attn.q_proj").get_parameter("weight")
    weight.data[3] = 0
    weight.data[5, :16] = 0
    return model.eval()


@pytest.fixture
def random_model() -> Callable[..., PreTrainedModel]:
    """``random_model(model_type, **config)``: see ``_random_model``."""
    return _random_model


@pytest.fixture
def quantized_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> QuantizedFolder:
    """``quantized_folder(model_type, bits=, group_size=, skip=, record=, **config)``: a new folder, q * s in fp32 with codes beside."""

    def build(
        model_type: str = "llama",
        *,
        bits: int = 4,
        group_size: int | Literal["channel"] = 16,
        skip: Sequence[str] = (),
        spec: QuantSpec | None = None,
        scheme: QuantScheme | None = None,
        record: dict[str, Any] | None = None,
        change: Callable[[PreTrainedModel], None] = lambda model: None,
        **config: Any,
    ) -> Path:
        model = _random_model(model_type, **config)
        change(model)
        state = quantize_model(model, scheme or spec or QuantSpec(bits=bits, group_size=group_size), skip)
        fold(model, state)
        folder = tmp_path / f"quantized-{len(list(tmp_path.iterdir()))}"
        own = {"base_model": "someone/some-model", "kind": "quantize", **(record or {}), "quant": state.record()}
        tensors = {"quant/codes.safetensors": state.tensors()}
        return save_model_folder(folder, model, tokenizer, own, dtype=torch.float32, extra_tensors=tensors)

    return build


@pytest.fixture
def exported(quantized_folder: QuantizedFolder, tmp_path: Path) -> Path:
    """A sound tied int4 export, not loaded in any runtime."""
    target = tmp_path / "exported"
    export_folder(quantized_folder(tie_word_embeddings=True), target, "compressed-tensors", runtimes=False)
    return target
