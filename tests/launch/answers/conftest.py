"""A tiny model that can answer: random weights, a tokenizer of its own, a chat template, a short context."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.launch.answers.opened import Opened, open_for_answers
from decoct.models.folder.model_folder import save_model_folder
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer

TEXT = "the cat sat on the mat, and the dog lay on the rug; é and 世 are letters too. "
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(
    path: Path, *, template: str | None = TEMPLATE, context: int = 96, rows: int = 0, seed: int = 0, vocabulary: int = 300
) -> Path:
    """A model folder; ``rows`` pads its head beyond the tokenizer, whose size is ``vocabulary`` and four control tokens."""
    tokenizer = train_tokenizer(iter([TEXT] * 20), vocabulary)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = template
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer) + rows, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=context, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    # far from uniform: greedy answers must not hang on the last bit
    model.get_output_embeddings().weight.data *= 40
    return save_model_folder(path, model, tokenizer, {"kind": "test"}, dtype=torch.float32)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that nobody may change."""
    return make_model(tmp_path_factory.mktemp("answers") / "tiny")


@pytest.fixture
def opened(folder: Path) -> Opened:
    return open_for_answers(str(folder))
