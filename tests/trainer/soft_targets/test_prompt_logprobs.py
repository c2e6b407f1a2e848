"""What a server says of a prompt's tokens is checked, value by value."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoct.trainer.soft_targets.prompt_logprobs import NoJsonError, WrongAnswerError, read_positions

V = 64


def answer(position: str, length: int = 3) -> bytes:
    return b'{"choices": [{"prompt_logprobs": [null' + f", {position}".encode() * (length - 1) + b"]}]}"


WRONG = {
    "400 digits": ('{"1": {"logprob": -1' + "0" * 400 + "}}", "not numbers"),
    "a mass of 5": (
        '{"1": {"logprob": 0}, "2": {"logprob": 0}, "3": {"logprob": 0}, "4": {"logprob": 0}, "5": {"logprob": 0}}',
        "sum to 5",
    ),
    "above 1": ('{"1": {"logprob": 2}}', "not numbers"),
    "no number": ('{"1": {"logprob": NaN}}', "not numbers"),
    "a text": ('{"1": {"logprob": "-1.5"}}', "not numbers"),
    "true": ('{"1": {"logprob": false}}', "not numbers"),
    "no logprob": ('{"1": {}}', "not numbers"),
    "no entry": ('{"1": -1}', "not numbers"),
    "a token twice": ('{"1": {"logprob": -1}, "1": {"logprob": -2}}', "occurs twice"),
    "a token spelt twice": ('{"1": {"logprob": -1}, "01": {"logprob": -1}}', "not a plain number"),
    "an underscore": ('{"1_0": {"logprob": -1}}', "not a plain number"),
    "a minus": ('{"-1": {"logprob": -1}}', "not a plain number"),
    "an id of 5,000 digits": ('{"' + "9" * 5000 + '": {"logprob": -1}}', "not a plain number"),
    "outside alone": ('{"64": {"logprob": -1}}', "none of the vocabulary's tokens"),
    "outside mostly": ('{"64": {"logprob": -0.1}, "5": {"logprob": -3}}', "outside the vocabulary of 64 tokens"),
    "nothing": ("{}", "none of the vocabulary's tokens"),
    "all of them minus infinity": ('{"1": {"logprob": -Infinity}, "2": {"logprob": -9999}}', "none of the vocabulary's tokens"),
    "null": ("null", "no log-probabilities of a position"),
    "a list": ("[1]", "no log-probabilities of a position"),
}


@pytest.mark.parametrize("case", WRONG)
def test_absurd_numbers_are_refused(case: str) -> None:
    position, expected = WRONG[case]
    with pytest.raises(WrongAnswerError, match=expected):
        read_positions(answer(position), length=3, v_eff=V)


@pytest.mark.parametrize("data", [b"", b"<html>", b"\xff\xfe\xfa", b'{"choices": [', b"[" * 200_000 + b"]" * 200_000])
def test_what_is_no_json_may_be_asked_for_again(data: bytes) -> None:
    with pytest.raises(NoJsonError, match="not JSON"):
        read_positions(data, length=3, v_eff=V)


@pytest.mark.parametrize(
    "told", [[1, 2], "x", None, {"choices": []}, {"error": {"message": "no"}}, {"choices": [{"prompt_logprobs": None}]}, {"choices": 1}]
)
def test_another_shape_is_told(told: object) -> None:
    with pytest.raises(WrongAnswerError, match=r"no choices\[0\]\.prompt_logprobs"):
        read_positions(json.dumps(told).encode(), length=3, v_eff=V)


@pytest.mark.parametrize("length", [2, 4])
def test_tokens_added_or_cut_are_told(length: int) -> None:
    with pytest.raises(WrongAnswerError, match=f"{length} positions for a prompt of 3 tokens"):
        read_positions(answer('{"1": {"logprob": -1}}', length), length=3, v_eff=V)


def test_padding_and_infinities_are_left_out_and_the_likeliest_comes_first() -> None:
    position = (
        '{"7": {"logprob": -3}, "5": {"logprob": -0.2}, "70": {"logprob": -12}, "8": {"logprob": -9999}, "9": {"logprob": -Infinity}}'
    )
    assert read_positions(answer(position), length=3, v_eff=V) == [[], [(5, -0.2), (7, -3.0)], [(5, -0.2), (7, -3.0)]]


_leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_keys = st.text("0123456789x", max_size=3) | st.just("logprob")


@settings(max_examples=100, deadline=None)
@given(st.recursive(_leaves, lambda inner: st.dictionaries(_keys, inner, max_size=4) | st.lists(inner, max_size=3), max_leaves=12))
def test_anything_is_read_or_refused(position: object) -> None:
    try:
        found = read_positions(answer(json.dumps(position)), length=3, v_eff=V)
    except WrongAnswerError:
        return
    for token, log in found[1]:
        assert 0 <= token < V
        assert -math.inf < log <= 1e-3
    assert sum(math.exp(log) for _, log in found[1]) <= 1.01
