"""Written text is kept by content, goes on where it ended, and reaches a run as documents or conversations."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from decoct.models.common.errors import UserError
from decoct.trainer.data.generated import WritingModel, generated_documents
from decoct.trainer.settings import DataSettings
from decoct.trainer.settings_generation import GenerateSettings

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Case:
    """A tiny model that writes, with the number of times it was loaded and the lines that were said."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        self.model = LlamaForCausalLM(config).eval()
        self.tokenizer, self.cache = tokenizer, cache
        self.loads = 0
        self.said: list[str] = []

    def documents(self, tokens: int = 120, kind: str = "text", seed: int = 0, content: str = "abc", **given: Any) -> Any:
        def load() -> tuple[Any, int]:
            self.loads += 1
            return self.model, 300

        asked = GenerateSettings(tokens=tokens, **{"batch": 4, "document_tokens": 16, **given})
        settings = DataSettings(generate=asked, kind=kind, seq_length=16)  # pyright: ignore[reportArgumentType]
        writer = WritingModel(name="tiny", content=content, tokenizer=self.tokenizer, load=load)
        return generated_documents(settings, writer, self.cache, seed, self.said.append)

    def parts(self) -> list[Path]:
        return sorted(self.cache.rglob("*.json"))


@pytest.fixture
def case(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Case:
    return Case(tokenizer, tmp_path)


@pytest.fixture
def chat(case: Case) -> Iterator[Case]:
    case.tokenizer.chat_template = TEMPLATE
    yield case
    case.tokenizer.chat_template = None


def test_text_is_written_once_and_read_from_the_cache_afterwards(case: Case) -> None:
    first = case.documents()
    again = case.documents()
    assert (list(first), first.fingerprint) == (list(again), again.fingerprint)
    assert case.loads == 1
    assert first.description.startswith("1") and "tokens that tiny wrote" in first.description


def test_more_text_goes_on_where_the_last_ended(case: Case) -> None:
    few = list(case.documents(tokens=120))
    count = len(case.parts())
    before = [part.read_bytes() for part in case.parts()]
    many = list(case.documents(tokens=300))
    assert many[: len(few)] == few
    assert len(case.parts()) > count
    assert [part.read_bytes() for part in case.parts()][:count] == before
    assert case.said[-1] == f"tiny writes {300 - _tokens(before):,} tokens of text"


def _tokens(parts: list[bytes]) -> int:
    return sum(json.loads(part)["tokens"] for part in parts)


def test_work_that_was_killed_ends_in_the_same_text(case: Case) -> None:
    whole = case.documents(tokens=300)
    parts = case.parts()
    assert len(parts) >= 4
    parts[-1].unlink()
    parts[1].write_text("{half")
    again = case.documents(tokens=300)
    assert again.fingerprint == whole.fingerprint
    assert list(again) == list(whole)


@pytest.mark.parametrize("other", [{"seed": 1}, {"content": "abd"}, {"temperature": 0.5}, {"document_tokens": 12}, {"batch": 5}])
def test_another_model_seed_or_sampling_writes_other_text(case: Case, other: dict[str, Any]) -> None:
    first, second = case.documents(), case.documents(**other)
    assert case.loads == 2
    # the other content is the same model here
    assert (first.fingerprint == second.fingerprint) == ("content" in other)


def test_conversations_are_rendered_by_the_template_or_handed_out_as_rows(chat: Case) -> None:
    rendered = chat.documents(tokens=200)
    rows = chat.documents(tokens=200, kind="chat")
    assert chat.loads == 1
    assert rendered.fingerprint != rows.fingerprint
    texts, found = list(rendered), list(rows.chats())
    assert len(texts) == len(found) > 0
    for text, (_, row) in zip(texts, found):
        user, assistant = (message["content"] for message in row["messages"])
        # the end token of the document comes from tokenizing
        assert text == f"<|user|>{user}<|endoftext|>\n<|assistant|>{assistant}"


def test_a_model_that_writes_nothing_is_refused(case: Case) -> None:
    with torch.no_grad():
        case.model.lm_head.weight.zero_()
        case.model.model.norm.weight.fill_(1.0)
        end: Any = case.tokenizer.eos_token_id
        case.model.lm_head.weight[end] = 50 * case.model.model.norm(case.model.model.embed_tokens.weight[0])
    with pytest.raises(UserError, match=r"tiny ends every text at its first token; give data.files, or another start"):
        case.documents()


def test_conversations_need_a_template(case: Case) -> None:
    with pytest.raises(UserError, match=r"data.kind is 'chat', and tiny has no chat template to write conversations in; use kind: text"):
        case.documents(kind="chat")


def test_progress_shows_inside_a_batch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # each look at the clock is five seconds later: a line at about every third step
    ticks = iter(range(0, 10**6, 5))
    monkeypatch.setattr("decoct.trainer.data.generated.time.monotonic", lambda: float(next(ticks)))
    case.documents(tokens=20, batch=2, document_tokens=64)
    lines = [line for line in case.said if "tokens written" in line]
    # one batch, and several lines about it; what passes the asked tokens is named
    assert len(case.parts()) == 1 and len(lines) > 1
    counts = [int(line.split(" of ")[0].replace(",", "")) for line in lines]
    assert counts == sorted(counts) and counts[0] <= 20 < counts[-1]
    for line, count in zip(lines, counts):
        assert "of 20 tokens written (" in line
        assert line.endswith("tokens/s), texts of the last batch are being finished" if count > 20 else "tokens/s)")
