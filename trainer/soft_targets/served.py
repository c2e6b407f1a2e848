"""A teacher on an OpenAI-compatible server that returns log-probabilities of the prompt, such as vLLM.

Each document is sent separately as token ids (``POST /v1/completions`` with ``prompt_logprobs``, vLLM's addition to OpenAI's parameters),
so that packed documents do not see each other. The answer holds the likeliest tokens per position with the full normaliser, at
temperature 1.
"""

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from ...losses.shift import MASKED
from ...losses.sparse import SparseTargets
from ...models.common.errors import UserError
from ...models.settings import ServedSettings
from .cached import spread
from .prompt_logprobs import NoJsonError, Position, WrongAnswerError, most_bytes, read_positions
from .server import NoAnswerError, Server

_LEAST_TAIL = 1e-6
"""Smallest tail mass: 1 minus a sum of fp32 numbers is rounding noise below it."""


class ServedTeacher:
    """A teacher that asks a server for the targets of each batch.

    Args:
        settings: Address, model, number of tokens, time limit.
        v_eff: Number of tokens in the real vocabulary; other ids in an answer count as tail.

    Raises:
        UserError: the environment variable of the key does not hold a valid key.
    """

    def __init__(self, settings: ServedSettings, v_eff: int) -> None:
        self._settings, self._v_eff = settings, v_eff
        self._device = torch.device("cpu")
        self._server = Server(settings.url, settings.key_variable, settings.timeout)
        # threads, because they wait for the network nearly all of the time
        self._pool = ThreadPoolExecutor(settings.requests)

    @property
    def v_eff(self) -> int:
        """Tokens of the real vocabulary."""
        return self._v_eff

    def to(self, device: torch.device | str) -> Self:
        """Returns targets on this device from now on."""
        self._device = torch.device(device)
        return self

    def describe(self) -> str:
        """Model, address, tokens per position, and the environment variable whose key is sent."""
        settings = self._settings
        key = f", with the key in {settings.key_variable}" if self._server.has_key else ""
        return f"{settings.model} served at {settings.url} ({settings.tokens} tokens per position{key})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a ServedTeacher is never saved or sent to another process: leave it out of hyperparameters and checkpoints")

    def sparse_targets(self, batch: Mapping[str, Tensor]) -> SparseTargets:
        """Targets of a batch, in bucket form. Their entropy counts the tail as one token, so it is a lower bound.

        Raises:
            UserError: the server cannot be reached, refuses, or gives an invalid answer.
        """
        labels = batch["labels"].cpu()
        # all documents of the batch at once: the pool keeps several requests in flight, and map returns answers in order
        documents = [piece for row in range(len(labels)) for piece in _documents(batch, row)]
        answers = list(self._pool.map(self._ask, [ids for _, _, ids in documents]))
        known: list[Position] = []
        for (row, begin, ids), positions in zip(documents, answers):
            # ``positions[at]`` is the distribution of the token at this place, given those before it
            known += [positions[at] for at in range(1, len(ids)) if labels[row, begin + at] != MASKED]
        return spread(self._targets(known), labels.to(self._device))

    def _targets(self, known: Sequence[Position]) -> SparseTargets:
        # positions have different numbers of tokens: the row is as wide as the longest, the rest has weight 0
        width = max((len(position) for position in known), default=1)
        ids = torch.zeros(len(known), width, dtype=torch.int64)
        logs = torch.full((len(known), width), -torch.inf, dtype=torch.float64)
        for row, position in enumerate(known):
            ids[row, : len(position)] = torch.tensor([token for token, _ in position])
            logs[row, : len(position)] = torch.tensor([log for _, log in position], dtype=torch.float64)
        # fp64 above, because the tail is a small difference
        tail = 1 - logs.exp().sum(1)
        log_tail = torch.where(tail > _LEAST_TAIL, tail.clamp(min=_LEAST_TAIL).log(), -torch.inf)
        # a tail that was dropped, and rounding, leave a sum other than 1
        whole = torch.logaddexp(logs.logsumexp(1), log_tail)
        logs, log_tail = logs - whole.unsqueeze(1), log_tail - whole
        entropy = torch.special.entr(torch.cat([logs, log_tail.unsqueeze(1)], 1).exp()).sum(1)
        parts = (logs.float(), entropy.float(), log_tail.float())
        logs, entropy, log_tail = (part.to(self._device) for part in parts)
        ids = ids.to(self._device)
        # the first id is the likeliest token, because positions are sorted
        return SparseTargets(ids, logs, entropy, ids[:, 0], log_tail)

    def _ask(self, ids: list[int]) -> list[Position]:
        """The known tokens of each position of one document; the first position is empty."""
        if len(ids) < 2:
            return [[]] * len(ids)
        settings = self._settings
        # max_tokens 1 is the least that servers accept; the generated token is not used
        body = {"model": settings.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": settings.tokens}
        question, most = json.dumps(body).encode(), most_bytes(len(ids), settings.tokens)
        trouble = ""
        for turn in range(settings.retries + 1):
            if turn:
                # 0.5, 1, 2, ... seconds, so that a server that restarts is not flooded
                time.sleep(min(30.0, 0.5 * 2 ** (turn - 1)))
            try:
                return read_positions(self._server.post("/completions", question, most), length=len(ids), v_eff=self._v_eff)
            except WrongAnswerError as error:
                # no retry: a server that answers another question will do so again
                raise UserError(f"the teacher's server {settings.url} (teacher.served.url) answered with {error}") from None
            except (NoAnswerError, NoJsonError) as error:
                trouble = str(error)
                if isinstance(error, NoAnswerError) and not error.again:
                    break
        raise UserError(
            f"the teacher's server {settings.url} (teacher.served.url) gave no answer for model {settings.model!r}: {trouble}. Check that "
            f"it runs, the model's name, and that it allows prompt_logprobs of {settings.tokens} (vLLM: --max-logprobs)"
        )


def _documents(batch: Mapping[str, Tensor], row: int) -> list[tuple[int, int, list[int]]]:
    """(row, first position, token ids) of each document of a window, without padding."""
    ids = batch["input_ids"][row].tolist()
    if "position_ids" in batch:
        # positions of packed windows restart at each document
        starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
        end = len(ids)
    else:
        starts, end = [0], int(batch["attention_mask"][row].sum())
    return [(row, first, ids[first:last]) for first, last in zip(starts, [*starts[1:], end])]
