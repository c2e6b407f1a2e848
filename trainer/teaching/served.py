"""A teacher behind an OpenAI-compatible server that gives log-probabilities of the prompt, such as vLLM.

Each document goes out as token ids by itself (``POST /v1/completions`` with ``prompt_logprobs``, which vLLM adds to OpenAI's parameters),
so that packed documents stay apart; what comes back are the likeliest tokens of each position with the full normaliser, at temperature 1.
"""

import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from ...losses.shift import MASKED
from ...losses.sparse import SparseTargets
from ...models.errors import UserError
from ...models.settings import ServedSettings
from .cached import spread

_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_LEAST_TAIL = 1e-6
"""1 minus a sum of fp32 numbers is noise below this."""

Position = list[tuple[int, float]]
"""(token, log-probability) of the tokens that are known, the likeliest first."""


class ServedTeacher:
    """Asks a server for each batch.

    Args:
        settings: Address, model, how many tokens, how long to wait.
        v_eff: Tokens of the real vocabulary; what the server says of others counts as tail.
    """

    def __init__(self, settings: ServedSettings, v_eff: int) -> None:
        self._settings, self._v_eff = settings, v_eff
        self._device = torch.device("cpu")
        self._pool = ThreadPoolExecutor(settings.requests)

    @property
    def v_eff(self) -> int:
        """Tokens of the real vocabulary."""
        return self._v_eff

    def to(self, device: torch.device | str) -> Self:
        """Give targets on this device from now on."""
        self._device = torch.device(device)
        return self

    def describe(self) -> str:
        """Model, address and tokens a position."""
        return f"{self._settings.model} served at {self._settings.url} ({self._settings.tokens} tokens a position)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a ServedTeacher is never saved or sent to another process: leave it out of hyperparameters and checkpoints")

    def sparse_targets(self, batch: Mapping[str, Tensor]) -> SparseTargets:
        """Targets of a batch, in bucket form. Their entropy takes the tail as one token: a lower bound.

        Raises:
            UserError: the server cannot be reached, refuses, or answers with something else than was asked for.
        """
        labels = batch["labels"].cpu()
        documents = [piece for row in range(len(labels)) for piece in _documents(batch, row)]
        answers = list(self._pool.map(self._ask, [ids for _, _, ids in documents]))
        known: list[Position] = []
        for (row, begin, ids), positions in zip(documents, answers):
            known += [positions[at] for at in range(1, len(ids)) if labels[row, begin + at] != MASKED]
        return spread(self._targets(known), labels.to(self._device))

    def _targets(self, known: Sequence[Position]) -> SparseTargets:
        width = max((len(position) for position in known), default=1)
        ids = torch.zeros(len(known), width, dtype=torch.int64)
        logs = torch.full((len(known), width), -torch.inf, dtype=torch.float64)
        for row, position in enumerate(known):
            ids[row, : len(position)] = torch.tensor([token for token, _ in position])
            logs[row, : len(position)] = torch.tensor([log for _, log in position], dtype=torch.float64)
        tail = 1 - logs.exp().sum(1)
        log_tail = torch.where(tail > _LEAST_TAIL, tail.clamp(min=_LEAST_TAIL).log(), -torch.inf)
        whole = torch.logaddexp(logs.logsumexp(1), log_tail)
        logs, log_tail = logs - whole.unsqueeze(1), log_tail - whole
        entropy = torch.special.entr(torch.cat([logs, log_tail.unsqueeze(1)], 1).exp()).sum(1)
        parts = (logs.float(), entropy.float(), log_tail.float())
        logs, entropy, log_tail = (part.to(self._device) for part in parts)
        ids = ids.to(self._device)
        return SparseTargets(ids, logs, entropy, ids[:, 0], log_tail)

    def _ask(self, ids: list[int]) -> list[Position]:
        """What the server knows of each position; that of the first is empty."""
        if len(ids) < 2:
            return [[]] * len(ids)
        settings = self._settings
        body = {"model": settings.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": settings.tokens}
        return self._read(self._post(json.dumps(body).encode()), len(ids))

    def _post(self, body: bytes) -> Any:
        settings = self._settings
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(settings.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{settings.url.rstrip('/')}/completions", body, headers)
        trouble = ""
        for turn in range(settings.retries + 1):
            if turn:
                time.sleep(min(30.0, 0.5 * 2 ** (turn - 1)))
            try:
                with urllib.request.urlopen(request, timeout=settings.timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                trouble = f"HTTP {error.code}: {error.read(500).decode('utf-8', 'replace').strip() or error.reason}"
                if error.code not in _AGAIN:
                    break
            except (OSError, ValueError) as error:
                trouble = str(getattr(error, "reason", "") or error) or type(error).__name__
        raise UserError(
            f"the teacher's server {settings.url} (teacher.served.url) gave no answer for model {settings.model!r}: {trouble}. Check that "
            f"it runs, the model's name, and that it allows prompt_logprobs of {settings.tokens} (vLLM: --max-logprobs)"
        )

    def _read(self, answer: Any, length: int) -> list[Position]:
        """The positions of an answer."""
        try:
            told = answer["choices"][0]["prompt_logprobs"]
            if len(told) != length:
                raise self._wrong(f"{len(told)} positions for a prompt of {length} tokens; it must not add or cut tokens")
            return [[], *(self._position(position) for position in told[1:])]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise self._wrong(f"no choices[0].prompt_logprobs as vLLM gives them ({type(error).__name__}: {error})") from None

    def _position(self, told: Mapping[str, Mapping[str, float]]) -> Position:
        position = [(int(token), float(entry["logprob"])) for token, entry in told.items()]
        position = [(token, log) for token, log in position if 0 <= token < self._v_eff and log > -math.inf]
        if not position or any(log > 1e-3 or math.isnan(log) for _, log in position):
            raise self._wrong("log-probabilities that are none, or none of the vocabulary's tokens")
        return sorted(position, key=lambda entry: -entry[1])

    def _wrong(self, what: str) -> UserError:
        return UserError(f"the teacher's server {self._settings.url} (teacher.served.url) answered with {what}")


def _documents(batch: Mapping[str, Tensor], row: int) -> list[tuple[int, int, list[int]]]:
    """(row, where it begins, token ids) of each document of a window, without padding."""
    ids = batch["input_ids"][row].tolist()
    if "position_ids" in batch:
        starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
        end = len(ids)
    else:
        starts, end = [0], int(batch["attention_mask"][row].sum())
    return [(row, first, ids[first:last]) for first, last in zip(starts, [*starts[1:], end])]
