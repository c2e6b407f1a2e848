"""Last words of sentences of held-out text."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from decoct.models.common.errors import UserError
from decoct.trainer.data.windows import Windows
from decoct.trainer.tasks.cloze import CONTEXT, last_words, score_cloze

FILL = "kado lofi migu nuta pedo rata kado lofi migu nuta pedo rata kado lofi migu nuta pedo rata"


def windows_of(texts: list[str], words: PreTrainedTokenizerBase, length: int = 96) -> Windows:
    rows = [words(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert max(map(len, rows)) <= length
    padded = [[*row, *[0] * (length - len(row))] for row in rows]
    return Windows(np.array(padded, dtype=np.int32), np.array([len(row) for row in rows], dtype=np.int32))


class Oracle:
    """Predicts the text, except for windows that it does not know."""

    batch = None

    def __init__(self, tokenizer: Any, wrong: tuple[int, ...] = ()) -> None:
        self.tokenizer, self.wrong = tokenizer, wrong

    def likeliest(self, windows: Windows, places: list[tuple[int, int]]) -> list[int]:
        assert places == sorted(places)
        known = [int(windows[window]["input_ids"][at]) for window, at in places]
        # one token of a word is enough to be wrong
        return [
            token + (window in self.wrong and at == max(a for w, a in places if w == window)) for token, (window, at) in zip(known, places)
        ]


def test_last_words_are_whole_words_before_a_full_stop(words: PreTrainedTokenizerBase) -> None:
    texts = [f"{FILL} logu. {FILL[:20]} kata! ab. 12. mido, lodo", f"kado. {FILL} nufi? x", f"{FILL} pegu"]
    windows = windows_of(texts, words)
    found = last_words(windows, words)
    spelled = [words.decode(windows[word.window]["input_ids"][word.first : word.first + word.length]) for word in found]
    assert spelled == [" logu", " kata", " nufi"]
    assert [word.window for word in found] == [0, 0, 1]


def test_a_word_needs_context_in_its_own_document_and_labels(words: PreTrainedTokenizerBase) -> None:
    ids = words(f"{FILL} logu. {FILL} kata.", add_special_tokens=False)["input_ids"]
    row = np.array([ids], dtype=np.int32)
    first, second = last_words(Windows(row), words)
    assert last_words(Windows(row, starts=np.array([0, second.first - CONTEXT + 1])), words) == [first]
    assert last_words(Windows(row, starts=np.array([0, second.first - CONTEXT])), words) == [first, second]
    prompt = row.copy()
    prompt[0, : first.first + 1] = -1 - prompt[0, : first.first + 1]
    assert last_words(Windows(prompt), words) == [second]


def test_score_is_the_share_of_words_with_every_token(words: PreTrainedTokenizerBase) -> None:
    windows = windows_of([f"{FILL} logu.", f"{FILL} kata.", f"{FILL} nufi.", f"{FILL} pegu."], words)
    model: Any = Oracle(words, wrong=(2,))
    score = score_cloze(model, windows)
    assert (score.score, score.items, score.shots) == (0.75, 4, 0)
    assert score.stderr == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    fewer = score_cloze(model, windows, limit=2, seed=1)
    assert fewer.items == 2
    assert fewer == score_cloze(model, windows, limit=2, seed=1)


def test_a_real_model_is_scored_by_its_greedy_tokens(language: Any, tiny: Any, words: PreTrainedTokenizerBase) -> None:
    ids = torch.tensor([words(FILL[:40], add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        for _ in range(40):
            ids = torch.cat([ids, tiny(ids).logits[:, -1:].argmax(-1)], dim=1)
    windows = Windows(ids.numpy().astype(np.int32))
    places = [(0, at) for at in range(ids.shape[1] - 40, ids.shape[1])]
    assert language.likeliest(windows, places) == ids[0, -40:].tolist()


def test_text_without_sentences_is_refused(words: PreTrainedTokenizerBase) -> None:
    model: Any = Oracle(words)
    with pytest.raises(UserError, match="no sentence that ends in a word"):
        score_cloze(model, windows_of([FILL], words))
