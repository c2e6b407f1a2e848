"""A model writes text: documents or conversations, the same for the same seed, cut where it does not end."""

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from decoct.models.common.errors import UserError
from decoct.trainer.data.sampling import TextWriter
from decoct.trainer.settings_generation import GenerateSettings

_ANSWER = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>{% endfor %}" + _ANSWER


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A tiny Llama with 20 rows that mean no token, and a head that prefers them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=128
    )
    found = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        found.lm_head.weight[300:] = 3 * found.lm_head.weight[:20]
    return found


def _writer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int = 0, **given: Any) -> TextWriter:
    settings = GenerateSettings(tokens=100, **{"batch": 4, "document_tokens": 24, "start": "text", **given})
    return TextWriter(model, tokenizer, settings, seed, 300)


def test_a_batch_depends_on_seed_and_number_alone(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    writer = _writer(model, tokenizer)
    first, second = writer.batch(0), writer.batch(1)
    torch.manual_seed(99)
    assert writer.batch(1) == second != first
    assert _writer(model, tokenizer).batch(0) == first
    assert _writer(model, tokenizer, seed=1).batch(0) != first


def test_the_random_numbers_of_the_process_are_left_alone(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _writer(model, tokenizer).batch(0)
    assert torch.equal(torch.rand(3), expected)


def test_tokens_are_drawn_from_the_models_own_distribution(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """First tokens against the softmax over the real vocabulary, computed by hand."""
    writer = _writer(model, tokenizer, batch=2000, document_tokens=8)
    logits = model(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1, :300].double()
    drawn = Counter([*own, writer._drawing.ends[0]][0] for own, _ in writer._sample([writer._start] * 2000, "x"))
    assert max(drawn) < 300
    expected = 2000 * torch.softmax(logits, 0)
    seen = torch.tensor([float(drawn[token]) for token in range(300)], dtype=torch.float64)
    # chi-square with 299 degrees of freedom: mean 299, standard deviation 24
    assert ((seen - expected) ** 2 / expected).sum() < 299 + 5 * 24.5


def test_documents_that_do_not_end_are_cut_and_counted(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    written = _writer(model, tokenizer, batch=16).batch(0)
    assert written.cut + written.empty <= 16
    assert written.cut > 0
    assert all(row.keys() == {"text"} for row in written.rows)
    assert len(written.rows) + written.empty == 16
    assert written.tokens <= 16 * 24


def test_in_a_template_the_model_writes_the_question_and_the_answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TEMPLATE
    try:
        writer = _writer(model, tokenizer, start="auto", batch=8)
        written = writer.batch(0)
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(writer._start) == "<|user|>"
    assert written.rows
    for row in written.rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"]
        assert assistant["content"]


@pytest.mark.parametrize(
    ("given", "template", "words"),
    [
        ({"start": "chat"}, None, "the tokenizer has no chat template; use text"),
        ({"start": "auto"}, "{{ messages[0]['content'] | upper }}", "does not render a user's message as it is"),
        (
            {"document_tokens": 128},
            None,
            r"document_tokens=128 and what stands before them take 129 tokens, and the model's context is 128",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, given: dict[str, Any], template: str | None, words: str
) -> None:
    tokenizer.chat_template = template
    try:
        with pytest.raises(UserError, match=words):
            _writer(model, tokenizer, **given)
    finally:
        tokenizer.chat_template = None
