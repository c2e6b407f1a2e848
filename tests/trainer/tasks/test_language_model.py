"""What tasks ask of a model, against the model's own logits, one sequence at a time."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from decoct.trainer.data.windows import Windows
from decoct.trainer.tasks.language_model import LanguageModel, LogLikelihood

CONTEXTS = ["kado lofi", "mita ", "kado", "", "kado kafi kagu kata lodo lofi logu lota"]
CONTINUATIONS = [" migu.", "nudo nufi", " pe", "rado", " mido mifi."]


@torch.no_grad()
def by_hand(model: Any, context: list[int], continuation: list[int]) -> LogLikelihood:
    logprobs = model.double()(torch.tensor([[*context, *continuation]])).logits[0].log_softmax(-1)[len(context) - 1 : -1]
    model.float()
    labels = torch.tensor(continuation)
    total = logprobs.gather(-1, labels[:, None]).sum().item()
    return LogLikelihood(logprob=total, greedy=bool((logprobs.argmax(-1) == labels).all()), tokens=len(continuation))


@torch.no_grad()
def greedy(model: Any, ids: list[int], count: int, end: int) -> list[int]:
    """Without a cache, padding or batches."""
    new: list[int] = []
    while len(new) < count:
        token = int(model(torch.tensor([[*ids, *new]])).logits[0, -1].argmax())
        if token == end:
            break
        new.append(token)
    return new


def test_loglikelihoods_are_those_of_the_models_own_logits(language: LanguageModel, tiny: PreTrainedModel) -> None:
    got = language.loglikelihood(CONTEXTS, CONTINUATIONS)
    for context, continuation, found in zip(CONTEXTS, CONTINUATIONS, got):
        expected = by_hand(tiny, *language.pair(context, continuation))
        assert (found.greedy, found.tokens) == (expected.greedy, expected.tokens)
        assert found.logprob == pytest.approx(expected.logprob, rel=1e-5)


def test_the_continuation_that_decoding_gives_is_greedy_and_another_is_not(language: LanguageModel, tiny: PreTrainedModel) -> None:
    context = language.encode("kado lofi")
    new = greedy(tiny, context, 4, end=-1)
    right, wrong = language.loglikelihood_of_ids([(context, new), (context, [*new[:-1], (new[-1] + 1) % 100])])
    assert right.greedy
    assert not wrong.greedy
    assert right.logprob > wrong.logprob


def test_context_and_continuation_are_encoded_together_and_spaces_go_to_the_continuation(
    language: LanguageModel, words: PreTrainedTokenizerBase
) -> None:
    whole = words("kado lofi", add_special_tokens=False)["input_ids"]
    assert language.pair("kado ", "lofi") == language.pair("kado", " lofi")
    context, continuation = language.pair("kado", " lofi")
    assert [*context, *continuation] == whole
    assert language.pair("", "kado")[0] == [words.eos_token_id]


def test_a_request_that_is_too_long_loses_its_beginning(language: LanguageModel, tiny: PreTrainedModel) -> None:
    ids = np.random.default_rng(0).integers(1, 100, 90).tolist()
    found = language.loglikelihood_of_ids([(ids[:80], ids[80:])])[0]
    assert language.longest == 64
    # 64 tokens go in, and the last of them predicts the last one
    assert found.logprob == pytest.approx(by_hand(tiny, ids[25:80], ids[80:]).logprob, rel=1e-5)


def test_an_empty_part_is_refused(language: LanguageModel) -> None:
    with pytest.raises(ValueError, match="no token"):
        language.loglikelihood_of_ids([([1], [])])


def test_a_rolling_text_is_predicted_once_token_by_token(language: LanguageModel, tiny: PreTrainedModel) -> None:
    short, long = "kado lofi.", " ".join(["kado lofi migu nuta"] * 40)
    ids = [*language.prefix, *language.encode(long)]
    assert 3 * 64 > len(ids) - 1 > 2 * 64
    parts = [(ids[:1], ids[1:65]), (ids[64:65], ids[65:129]), (ids[-65:129], ids[129:])]
    expected = sum(by_hand(tiny, *part).logprob for part in parts)
    one = by_hand(tiny, language.prefix, language.encode(short)).logprob
    assert language.rolling([long, short]) == pytest.approx([expected, one], rel=1e-5)


def test_generation_with_a_cache_in_a_batch_is_that_of_one_at_a_time(
    language: LanguageModel, tiny: PreTrainedModel, words: PreTrainedTokenizerBase
) -> None:
    """Also with a generation config that would penalize repetition, and dropout switched on outside."""
    tiny.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=2.0, eos_token_id=0)
    tiny.train()
    prompts = ["kado", "lofi migu nuta pedo", "rata kado lofi", "mi"]
    got = language.generate_until(prompts, ["\x00"], 12)
    assert tiny.training
    assert tiny.generation_config.repetition_penalty == 5.0
    tiny.eval()
    for prompt, text in zip(prompts, got):
        assert text == words.decode(greedy(tiny, language.encode(prompt), 12, end=0), skip_special_tokens=True)


def test_a_stop_string_ends_a_text_and_is_left_out(language: LanguageModel) -> None:
    whole = language.generate_until(["kado", "lofi migu"], [], 12)
    stops = [text[3:5] for text in whole]
    cut = language.generate_until(["kado", "lofi migu"], stops, 12)
    for text, shorter in zip(whole, cut):
        assert shorter == text[: min(at for stop in stops if (at := text.find(stop)) >= 0)]
        assert len(shorter) <= 3


def test_likeliest_tokens_at_places_of_packed_windows(language: LanguageModel, tiny: PreTrainedModel) -> None:
    rows = np.random.default_rng(1).integers(1, 100, (5, 16)).astype(np.int32)
    windows = Windows(rows, starts=np.array([0, 20, 40]))
    places = [(0, 3), (0, 9), (1, 2), (1, 7), (4, 15)]
    got = language.likeliest(windows, places)
    begins = [0, 0, 0, 4, 0]
    for (window, at), begin, token in zip(places, begins, got):
        ids = rows[window, begin:at].astype(np.int64)
        assert token == int(tiny(torch.from_numpy(ids)[None]).logits[0, -1].argmax())


def test_weights_that_are_not_fp32_are_refused(tiny: PreTrainedModel, words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="scored in fp32"):
        LanguageModel(tiny.bfloat16(), words)
