"""Reads vLLM's answer about the tokens of a prompt (``prompt_logprobs``) and checks all of it."""

import json
import math
import re
from typing import Any

Position = list[tuple[int, float]]
"""(token, log-probability) of the known tokens, the likeliest first."""

_TOKEN = re.compile(r"0|[1-9][0-9]{0,9}")
_ROUNDING = 0.01
"""Largest mass above 1, or outside the vocabulary, that is accepted as an effect of rounding and padding."""
_NOTHING = -5000.0
"""Log-probabilities below this mean a probability of 0: JSON has no infinity, and vLLM writes -9999 for it."""
# JSON of one entry: id, log-probability, rank and the token's text, which may be long and escaped
_BYTES_A_TOKEN = 512
_BYTES_BESIDE = 65_536


class NoJsonError(ValueError):
    """The answer is not complete JSON."""


class WrongAnswerError(ValueError):
    """The answer is JSON, but not an answer to the request; the text completes 'answered with ...'."""


def most_bytes(length: int, tokens: int) -> int:
    """Largest size in bytes of an answer about ``length`` positions, each with ``tokens`` tokens and the prompt's own."""
    # the prompt's own token is added to the likeliest where it is not among them
    return _BYTES_BESIDE + length * (tokens + 1) * _BYTES_A_TOKEN


def read_positions(data: bytes, *, length: int, v_eff: int) -> list[Position]:
    """The known tokens of each position of a prompt of ``length`` tokens; the first position is empty.

    Args:
        data: Body of the answer.
        length: Number of tokens of the prompt.
        v_eff: Number of tokens in the real vocabulary; other ids, which a padded head may give, count as tail.

    Raises:
        NoJsonError: the body is not JSON.
        WrongAnswerError: the number of positions differs, or the numbers are not log-probabilities of this vocabulary.
    """
    try:
        answer = json.loads(data, object_pairs_hook=_once)
    except WrongAnswerError:
        raise
    except (ValueError, RecursionError) as error:
        raise NoJsonError(f"an answer that is not JSON ({type(error).__name__})") from None
    try:
        positions = answer["choices"][0]["prompt_logprobs"]
        count = len(positions)
    except (KeyError, IndexError, TypeError) as error:
        raise WrongAnswerError(f"no choices[0].prompt_logprobs as vLLM gives them ({type(error).__name__})") from None
    if not isinstance(positions, list) or count != length:
        raise WrongAnswerError(f"{count} positions for a prompt of {length} tokens; it must not add or cut tokens")
    # the first position is null in the answer: nothing predicts the first token
    return [[], *(_position(position, v_eff) for position in positions[1:])]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses an object with a repeated key, of which Python's JSON reader would silently keep the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise WrongAnswerError("a key (such as a token) that occurs twice in one object")
    return found


def _position(entries: Any, v_eff: int) -> Position:
    if not isinstance(entries, dict):
        raise WrongAnswerError("no log-probabilities of a position")
    known: Position = []
    mass = outside = 0.0
    for token, entry in entries.items():
        log = _log(entry)
        if not _TOKEN.fullmatch(token):
            raise WrongAnswerError("a token whose id is not a plain number")
        # probability 0: such a token must not take a slot
        if log < _NOTHING:
            continue
        mass += math.exp(log)
        if int(token) < v_eff:
            known.append((int(token), log))
        else:
            outside += math.exp(log)
    if not known or outside > _ROUNDING:
        raise WrongAnswerError(
            "none of the vocabulary's tokens"
            if not known
            else f"tokens of probability {outside:.2f} outside the vocabulary of {v_eff:,} tokens; teacher.path names another model"
        )
    if mass > 1 + _ROUNDING:
        raise WrongAnswerError(f"invalid log-probabilities: the probabilities of one position sum to {mass:.3g}")
    # vLLM puts the prompt's own token out of order
    return sorted(known, key=lambda entry: -entry[1])


def _log(entry: Any) -> float:
    log: Any = entry.get("logprob") if isinstance(entry, dict) else None
    # type() and not isinstance, because bool is an int; the bound, because an int of 400 digits does not fit a float
    if type(log) in (int, float) and -1e308 < log <= 1e-3:
        return float(log)
    if log == -math.inf:
        return -math.inf
    raise WrongAnswerError("invalid log-probabilities: not numbers from -infinity to 0")
