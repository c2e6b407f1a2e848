"""A tiny model whose predictions differ from place to place, and its tokenizer."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from decoct.trainer.tasks.language_model import LanguageModel


def _model(vocabulary: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, attention_dropout=0.5, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny(words: PreTrainedTokenizerBase) -> PreTrainedModel:
    return _model(len(words) + 4, 0)


@pytest.fixture
def language(tiny: PreTrainedModel, words: PreTrainedTokenizerBase) -> LanguageModel:
    return LanguageModel(tiny, words, batch=3)
