"""What tasks ask of a model: the log-likelihood of a continuation, the likeliest next tokens, and greedy text up to a stop.

Logits are fp32 over the full head (law 2, docs/architecture.md), from the same backbone and head as all other figures. Requests are batched
by length, so that batches hold little padding. Sums over different paddings differ in the last digits, as with any batched evaluation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...models.common.errors import UserError
from ...models.eval_mode import eval_mode
from ...models.families import backbone_and_head, head_transform, text_config
from ..data.tokens import outer_ids
from ..evaluation.figures import BATCH_TOKENS, LOGITS, Head, exact_products, head_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.windows import Windows

LONGEST = 4096
"""Tokens of a request at most, for models that take more: longer ones lose their beginning."""


@dataclass(frozen=True, kw_only=True)
class LogLikelihood:
    """A continuation, given its context."""

    logprob: float
    """Log-probability of the continuation in nats: the sum over its tokens."""
    greedy: bool
    """Whether greedy decoding gives the continuation."""
    tokens: int
    """Tokens of the continuation."""


class LanguageModel:
    """A model in memory, as tasks use it.

    Args:
        model: Causal language model with fp32 weights.
        tokenizer: Its tokenizer.
        device: Device to compute on; the model is moved there.
        batch: Sequences per forward pass; None = as many as fit into 4,096 tokens, at least one.

    Raises:
        ValueError: a weight of the model is not fp32.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        device: str | torch.device = "cpu",
        batch: int | None = None,
    ) -> None:
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32:
                raise ValueError(f"{name} is {parameter.dtype}; tasks are scored in fp32: load the model with dtype=torch.float32")
        self.model: Any = model.to(torch.device(device))  # pyright: ignore[reportArgumentType] - transformers' wrapper hides nn.Module.to
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.batch = batch
        self.longest = min(getattr(text_config(model.config), "max_position_embeddings", None) or LONGEST, LONGEST)
        """Tokens of a request, context and continuation together."""
        self._begin, _ = outer_ids(tokenizer)
        ends = [i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if isinstance(i, int)]
        self._pad = ends[0] if ends else 0

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without those that begin or end a document."""
        ids: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @property
    def prefix(self) -> list[int]:
        """What stands before a text without a context: the begin-of-text token, or else the end-of-text token of a text before it."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if isinstance(token, int):
                return [token]
        raise UserError("the tokenizer has neither a begin-of-text nor an end-of-text token, so nothing can stand before an empty context")

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and of its continuation, as they are encoded together. Spaces between belong to the continuation."""
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        if not context:
            return self._begin or self.prefix, self.encode(continuation)
        first, both = self.encode(context), self.encode(context + continuation)
        # where the end of the context and the beginning of the continuation become one token, the continuation is encoded alone
        return [*self._begin, *first], both[len(first) :] or self.encode(continuation)

    def loglikelihood(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[LogLikelihood]:
        """Log-likelihood of each continuation after its context."""
        return self.loglikelihood_of_ids([self.pair(context, text) for context, text in zip(contexts, continuations, strict=True)])

    def loglikelihood_of_ids(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[LogLikelihood]:
        """Log-likelihoods of continuations, as token ids; contexts have at least one token.

        Raises:
            ValueError: a context or a continuation is empty.
        """
        if not all(context and continuation for context, continuation in pairs):
            raise ValueError("a context or a continuation has no token")
        # the last token predicts nothing
        rows = [
            ([*context, *continuation][-self.longest - 1 :][:-1], list(continuation)[-self.longest :]) for context, continuation in pairs
        ]
        found: list[LogLikelihood | None] = [None] * len(rows)
        for group, hidden, head in self._hidden([ids for ids, _ in rows]):
            ends = [len(rows[index][0]) for index in group]
            states = [hidden[at, end - len(rows[index][1]) : end] for at, (index, end) in enumerate(zip(group, ends))]
            labels = torch.tensor([token for index in group for token in rows[index][1]], device=self.device)
            logprobs, likeliest = self._scored(torch.cat(states), labels, head)
            sizes = [len(rows[index][1]) for index in group]
            for index, logprob, hits in zip(group, logprobs.split(sizes), (likeliest == labels).split(sizes)):
                total, tokens = float(logprob.double().sum()), len(rows[index][1])
                found[index] = LogLikelihood(logprob=total, greedy=bool(hits.all()), tokens=tokens)
        return [each for each in found if each is not None]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood of each text as a whole, each token once. A text that is too long goes in parts: each sees one token of the part
        before it, and the last as many as fit, as lm-eval has it."""
        parts: list[tuple[list[int], list[int]]] = []
        counts: list[int] = []
        for text in texts:
            ids = [*(self._begin or self.prefix), *self.encode(text)]
            ends = [(at, min(at + self.longest, len(ids))) for at in range(1, len(ids), self.longest)]
            cut = [(ids[max(0, end - self.longest - 1) : at], ids[at:end]) for at, end in ends]
            parts += cut
            counts.append(len(cut))
        scored = iter(self.loglikelihood_of_ids(parts))
        return [sum(next(scored).logprob for _ in range(count)) for count in counts]

    def likeliest(self, windows: "Windows", places: Sequence[tuple[int, int]]) -> list[int]:
        """The likeliest token at each place of a window, given what stands before it there.

        Args:
            windows: Text; documents of a packed window do not see each other.
            places: (window, position of the token in it, at least 1), ascending.
        """
        from ...models.batches import backbone_inputs

        by_window: dict[int, list[int]] = {}
        for window, at in places:
            by_window.setdefault(window, []).append(at - 1)
        numbers = list(by_window)
        size = self.batch or max(1, BATCH_TOKENS // windows.seq_length)
        found: list[int] = []
        with torch.no_grad(), eval_mode(self.model), exact_products(self.device.type):
            backbone, head = self._parts()
            for first in range(0, len(numbers), size):
                group = numbers[first : first + size]
                rows = [windows[number] for number in group]
                batch = {key: torch.stack([row[key] for row in rows]).to(self.device) for key in rows[0]}
                hidden = backbone(**backbone_inputs(batch)).last_hidden_state
                states = torch.cat([hidden[at, by_window[number]] for at, number in enumerate(group)])
                found += self._scored(states, None, head)[1].tolist()
        return found

    def generate_until(self, prompts: Sequence[str], until: Sequence[str], max_tokens: int) -> list[str]:
        """Greedy text after each prompt, up to the first of ``until`` (left out), the end-of-text token or ``max_tokens`` tokens."""
        from .greedy_text import generate

        room = max(1, self.longest - max_tokens)
        rows = [([*self._begin, *self.encode(prompt)] or self.prefix)[-room:] for prompt in prompts]
        found = [""] * len(rows)
        for group in self._groups([len(row) for row in rows], extra=max_tokens):
            texts = generate(self.model, self.tokenizer, [rows[index] for index in group], until, max_tokens, self._pad, self.device)
            for index, text in zip(group, texts):
                found[index] = text
        return found

    def _parts(self) -> tuple[Any, Head]:
        backbone, weight, bias = backbone_and_head(self.model)
        return backbone, (weight, bias, head_transform(self.model.config))

    def _groups(self, lengths: Sequence[int], extra: int = 0) -> Iterator[list[int]]:
        """Indices of requests that go through the model together, the longest first, so that memory runs out at once or never."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        first = 0
        while first < len(order):
            size = self.batch or max(1, BATCH_TOKENS // (lengths[order[first]] + extra))
            yield order[first : first + size]
            first += size

    def _hidden(self, rows: Sequence[list[int]]) -> Iterator[tuple[list[int], Tensor, Head]]:
        """Last hidden states [B, S, H] of groups of rows, padded on the right."""
        with torch.no_grad(), eval_mode(self.model), exact_products(self.device.type):
            backbone, head = self._parts()
            for group in self._groups([len(row) for row in rows]):
                width = len(rows[group[0]])
                ids = torch.full((len(group), width), self._pad, dtype=torch.int64)
                mask = torch.zeros_like(ids)
                for at, index in enumerate(group):
                    ids[at, : len(rows[index])] = torch.tensor(rows[index])
                    mask[at, : len(rows[index])] = 1
                given = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device), "use_cache": False}
                yield group, backbone(**given).last_hidden_state, head

    def _scored(self, states: Tensor, labels: Tensor | None, head: Head) -> tuple[Tensor, Tensor]:
        """(log-probabilities of the labels [N], likeliest tokens [N] int64) of hidden states [N, H], some rows of logits at a time."""
        size = max(1, LOGITS // head[0].shape[0])
        logprobs, likeliest = [], []
        for at in range(0, len(states), size):
            logits = head_logits(states[at : at + size], head)
            likeliest.append(logits.argmax(-1))
            if labels is not None:
                logprobs.append(torch.log_softmax(logits, -1).gather(-1, labels[at : at + size, None])[:, 0])
        none = states.new_empty(0)
        return torch.cat(logprobs) if logprobs else none, torch.cat(likeliest) if likeliest else none.long()
