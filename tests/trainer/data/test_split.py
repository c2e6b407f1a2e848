"""Which documents are held out."""

import numpy as np
import pytest

from decoct.models.common.errors import UserError
from decoct.trainer.data.split import HeldOutRule, Split, held_out_of_a_run, split_documents
from decoct.trainer.data.tokens import TokenStream


def stream(lengths: list[int], hashes: list[int] | None = None) -> TokenStream:
    bounds = np.cumsum([0, *lengths])
    given = np.random.default_rng(0).integers(0, 2**63, len(lengths)) if hashes is None else np.array(hashes)
    return TokenStream(np.arange(bounds[-1], dtype=np.int32), bounds, given.astype(np.uint64))


def positions(segments: np.ndarray) -> list[int]:
    return [at for begin, end in segments.tolist() for at in range(begin, end)]


def split(text: TokenStream, seq_length: int = 4, eval_tokens: int = 8, packing: bool = True, held_out: HeldOutRule = "blocks") -> Split:
    return split_documents(text, seq_length=seq_length, eval_tokens=eval_tokens, packing=packing, held_out=held_out)


def test_whole_documents_are_held_out_until_there_is_enough() -> None:
    text = stream([5] * 40)
    got = split(text)
    held = np.argsort(text.hashes)[:2]
    assert got.rule == "documents"
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
def test_the_older_rule_holds_out_the_end_of_text_that_whole_documents_would_waste(text: TokenStream) -> None:
    got = split(text, held_out="end")
    assert got.rule == "end"
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


def test_blocks_from_all_over_a_long_document_are_held_out_and_nothing_of_them_is_trained_on() -> None:
    text = stream([4003])
    got = split(text, seq_length=10, eval_tokens=400)
    assert got.rule == "blocks"
    assert len(got.evaluation) == 40
    assert (np.diff(got.evaluation) == 10).all()
    assert not (got.evaluation % 10).any()
    assert sorted(positions(got.train) + positions(got.evaluation)) == list(range(4003))
    # a uniform choice of 40 of 400 leaves a tenth of the text empty once in thousands of seeds
    assert set(got.evaluation[:, 0] // 400) == set(range(10))
    assert got.train.tolist() == sorted(got.train.tolist())
    assert (got.train[1:, 0] > got.train[:-1, 1]).all(), "stretches that touch are one"


def test_blocks_go_by_their_tokens_and_not_by_their_place() -> None:
    """The same long documents in another order: the same tokens are held out, in the same order."""

    def held(order: list[int]) -> list[list[int]]:
        parts = [np.arange(300 * d, 300 * d + 300, dtype=np.int32) for d in order]
        text = TokenStream(np.concatenate(parts), np.arange(0, 901, 300), np.array([5 + d for d in order], dtype=np.uint64))
        got = split(text, seq_length=10, eval_tokens=60)
        assert got.rule == "blocks"
        return [text.tokens[begin:end].tolist() for begin, end in got.evaluation.tolist()]

    assert held([0, 1, 2]) == held([2, 0, 1])


def test_copies_of_a_held_out_block_are_not_trained_on() -> None:
    once = np.arange(200, dtype=np.int32)
    text = TokenStream(np.concatenate([once, once]), np.array([0, 200, 400]), np.array([9, 9], dtype=np.uint64))
    got = split(text, seq_length=10, eval_tokens=20)
    assert got.rule == "blocks"
    held = {int(text.tokens[:][at]) for at in positions(got.evaluation)}
    assert len(held) == 20
    assert not held & {int(text.tokens[:][at]) for at in positions(got.train)}
    assert len(positions(got.train)) == 360


def test_stretches_of_training_never_join_two_documents() -> None:
    got = split(stream([55, 55]), seq_length=10, eval_tokens=10)
    assert got.rule == "blocks"
    assert 55 in got.train[:, 0]
    assert 55 in got.train[:, 1]


def test_text_that_is_one_block_over_and_over_is_held_out_from_its_end() -> None:
    text = TokenStream(np.tile(np.arange(10, dtype=np.int32), 20), np.array([0, 200]), np.array([1], dtype=np.uint64))
    got = split(text, seq_length=10, eval_tokens=20)
    assert got.rule == "end"
    assert positions(got.evaluation) == list(range(180, 200))


def test_a_long_document_held_out_whole_is_measured_all_over_and_not_trained_on() -> None:
    text = stream([100] * 30, [1, *range(100, 129)])
    got = split(text, seq_length=10, eval_tokens=40)
    assert got.rule == "documents"
    assert got.evaluation.tolist() == [[0, 10], [20, 30], [50, 60], [70, 80]]
    assert positions(got.train) == list(range(100, 3000))
    assert split(text, seq_length=10, eval_tokens=40, held_out="end").evaluation.tolist() == [[0, 100]]


@pytest.mark.parametrize("text", [stream([400]), stream([5] * 40), stream([100] * 30)], ids=["blocks", "documents", "long documents"])
def test_without_training_the_same_is_measured(text: TokenStream) -> None:
    got = held_out_of_a_run(text, seq_length=4, eval_tokens=16, packing=True)
    assert got.evaluation.tolist() == split(text, eval_tokens=16).evaluation.tolist()
    assert len(got.train) == 0
    everything = held_out_of_a_run(text, seq_length=4, eval_tokens=10**6, packing=True)
    assert sorted(positions(everything.evaluation)) == list(range(int(text.bounds[-1])))
