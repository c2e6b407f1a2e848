"""Tiny real models of the four families that decoct reshapes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

# Any and not PreTrainedModel: tests reach into modules by attribute
TinyModel = Callable[..., Any]

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    # large enough that every part of the network moves the logits
    "initializer_range": 0.2,
}


@pytest.fixture
def tiny_model() -> TinyModel:
    """``tiny_model(model_type, dtype=..., **config)``: random weights and biases, seeded, eval mode."""

    def build(model_type: str = "llama", *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
        config = AutoConfig.for_model(model_type, **{**_COMMON, **overrides})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return build
