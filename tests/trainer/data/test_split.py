"""Which documents are held out."""

import numpy as np
import pytest

from decoct.models.common.errors import UserError
from decoct.trainer.data.split import Split, split_documents
from decoct.trainer.data.tokens import TokenStream


def stream(lengths: list[int], hashes: list[int] | None = None) -> TokenStream:
    bounds = np.cumsum([0, *lengths])
    given = np.random.default_rng(0).integers(0, 2**63, len(lengths)) if hashes is None else np.array(hashes)
    return TokenStream(np.arange(bounds[-1], dtype=np.int32), bounds, given.astype(np.uint64))


def positions(segments: np.ndarray) -> list[int]:
    return [at for begin, end in segments.tolist() for at in range(begin, end)]


def split(text: TokenStream, seq_length: int = 4, eval_tokens: int = 8, packing: bool = True) -> Split:
    return split_documents(text, seq_length=seq_length, eval_tokens=eval_tokens, packing=packing)


def test_whole_documents_are_held_out_until_there_is_enough() -> None:
    text = stream([5] * 40)
    got = split(text)
    held = np.argsort(text.hashes)[:2]
    assert got.whole
    assert got.evaluation.tolist() == [[5 * i, 5 * i + 5] for i in held]
    assert sorted(positions(got.train) + positions(got.evaluation)) == list(range(200))


def test_choice_goes_by_the_text_and_not_by_its_place() -> None:
    lengths, hashes = [3, 6, 5, 7, 4] * 8, list(range(1000, 1040))
    order = np.random.default_rng(1).permutation(40)
    here, there = stream(lengths, hashes), stream([lengths[i] for i in order], [hashes[i] for i in order])

    def held(text: TokenStream) -> list[int]:
        return [int(text.hashes[np.searchsorted(text.bounds, begin)]) for begin, _ in split(text).evaluation.tolist()]

    assert held(here) == held(there) == [1000, 1001]


def test_copies_of_a_held_out_document_are_not_trained_on() -> None:
    text = stream([5] * 40, [7, 1, 2, 1, *range(10, 46)])
    got = split(text)
    assert got.evaluation.tolist() == [[5, 10], [10, 15]]
    assert not set(positions(got.train)) & set(range(5, 20))
    assert len(got.train) == 37


@pytest.mark.parametrize("text", [stream([100]), stream([40, 60]), stream([4] * 25, [3] * 25)], ids=["one", "two long", "copies"])
def test_text_that_whole_documents_would_waste_is_held_out_from_its_end(text: TokenStream) -> None:
    got = split(text)
    assert not got.whole
    assert positions(got.train) == list(range(92))
    assert positions(got.evaluation) == list(range(92, 100))


def test_text_too_short_for_a_window_or_for_both_sides_says_what_to_lower() -> None:
    with pytest.raises(UserError, match=r"3 tokens in 1 document.*fewer than one window of data\.seq_length=4"):
        split(stream([3]))
    with pytest.raises(UserError, match=r"data\.eval_tokens=30 held out.*lower data\.eval_tokens to at most 26"):
        split(stream([30]), eval_tokens=30)
    with pytest.raises(UserError, match=r"lower data\.seq_length and data\.eval_tokens"):
        split(stream([7]), eval_tokens=4)
    assert len(positions(split(stream([30]), eval_tokens=26).train)) == 4
