"""Reads what vLLM answers about the tokens of a prompt (``prompt_logprobs``), and believes none of it unchecked."""

import json
import math
import re
from typing import Any

Position = list[tuple[int, float]]
"""(token, log-probability) of the tokens that are known, the likeliest first."""

_TOKEN = re.compile(r"0|[1-9][0-9]{0,9}")
_ROUNDING = 0.01
"""Mass beyond 1, or outside the vocabulary, that rounding and padding may explain."""
_NOTHING = -5000.0
"""Log-probabilities below mean 0: JSON has no infinity, and vLLM writes -9999 for it."""
_BYTES_A_TOKEN = 512
_BYTES_BESIDE = 65_536


class NoJsonError(ValueError):
    """The answer is not whole JSON."""


class WrongAnswerError(ValueError):
    """The answer is JSON, and not what was asked for; the text ends 'answered with ...'."""


def most_bytes(length: int, tokens: int) -> int:
    """Bytes that an answer about ``length`` positions of ``tokens`` tokens, and the one that stands there, takes at most."""
    return _BYTES_BESIDE + length * (tokens + 1) * _BYTES_A_TOKEN


def read_positions(data: bytes, *, length: int, v_eff: int) -> list[Position]:
    """What the server knows of each position of a prompt of ``length`` tokens; that of the first is empty.

    Args:
        data: Body of the answer.
        length: Tokens of the prompt.
        v_eff: Tokens of the vocabulary; others, which a padded head may name, count as tail.

    Raises:
        NoJsonError: the body is not JSON.
        WrongAnswerError: another number of positions, or numbers that are no log-probabilities of this vocabulary.
    """
    try:
        answer = json.loads(data, object_pairs_hook=_once)
    except WrongAnswerError:
        raise
    except (ValueError, RecursionError) as error:
        raise NoJsonError(f"an answer that is no JSON ({type(error).__name__})") from None
    try:
        told = answer["choices"][0]["prompt_logprobs"]
        count = len(told)
    except (KeyError, IndexError, TypeError) as error:
        raise WrongAnswerError(f"no choices[0].prompt_logprobs as vLLM gives them ({type(error).__name__})") from None
    if not isinstance(told, list) or count != length:
        raise WrongAnswerError(f"{count} positions for a prompt of {length} tokens; it must not add or cut tokens")
    return [[], *(_position(position, v_eff) for position in told[1:])]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise WrongAnswerError("a key (such as a token) that stands twice in one object")
    return found


def _position(told: Any, v_eff: int) -> Position:
    if not isinstance(told, dict):
        raise WrongAnswerError("no log-probabilities of a position")
    known: Position = []
    mass = outside = 0.0
    for token, entry in told.items():
        log = _log(entry)
        if not _TOKEN.fullmatch(token):
            raise WrongAnswerError("a token whose id is no plain number")
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
        raise WrongAnswerError(f"log-probabilities that are none: those of one position sum to {mass:.3g}")
    return sorted(known, key=lambda entry: -entry[1])


def _log(entry: Any) -> float:
    log: Any = entry.get("logprob") if isinstance(entry, dict) else None
    # True is a number to Python, and a number of 400 digits is none to a float
    if type(log) in (int, float) and -1e308 < log <= 1e-3:
        return float(log)
    if log == -math.inf:
        return -math.inf
    raise WrongAnswerError("log-probabilities that are none: not numbers from -infinity to 0")
