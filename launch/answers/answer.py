"""One answer of one model: greedy or sampled, token by token."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...models.common.errors import UserError
from ...models.generation import end_ids, only_these_settings, real_tokens
from .decoded import Decoded
from .opened import Opened

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Finish = Literal["end", "max_tokens", "context", "interrupted"]
_SAYINGS = {
    "end": "ended by itself",
    "max_tokens": "stopped at --max-tokens",
    "context": "stopped at the end of the model's context",
    "interrupted": "interrupted",
}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the likeliest token each time (greedy)."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens={self.max_tokens} must be at least 1")
        if not 0 <= self.temperature <= 100:
            raise UserError(f"--temperature={self.temperature} must be between 0 (the likeliest token) and 100")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p={self.top_p} must be above 0 and at most 1 (all tokens)")
        # greedy decoding looks at one token alone
        if self.top_p < 1 and self.temperature == 0:
            raise UserError(f"--top-p={self.top_p} has no effect without sampling; give --temperature too, such as 0.7")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed={self.seed} must be a whole number from 0 on")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said."""

    text: str
    ids: list[int]
    prompt_tokens: int
    finish: Finish
    seconds: float
    tokens_per_second: float | None
    """Of the tokens after the first, which waits for the prompt; None with fewer than two."""

    def words(self) -> str:
        """Length, speed and end of the answer, for people."""
        speed = f", {self.tokens_per_second:.3g} tokens/s" if self.tokens_per_second else ""
        return f"{len(self.ids):,} token{'s' * (len(self.ids) != 1)}{speed}; {_SAYINGS[self.finish]}"


def prompt_ids(opened: Opened, prompt: str) -> list[int]:
    """The ids of a prompt, with the tokens that the tokenizer puts before a text.

    Raises:
        UserError: the prompt is empty.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty; give the beginning of a text to go on from")
    return list(opened.tokenizer(prompt)["input_ids"])  # pyright: ignore[reportArgumentType] - one text gives one list


def check_room(opened: Opened, ids: list[int], which: str = "the prompt") -> None:
    """UserError when a prompt leaves no room for an answer in the model's context."""
    if opened.context is not None and len(ids) >= opened.context:
        raise UserError(
            f"{which} has {len(ids):,} tokens, and the context of {opened.name} has {opened.context:,}, which prompt and answer share; "
            f"shorten {which}"
        )


@torch.no_grad()
def answer(
    opened: Opened, ids: list[int], sampling: Sampling, *, say: Callable[[str], None] = lambda _: None, stops: Iterable[int] = ()
) -> Answer:
    """Go on from ``ids``. Ctrl-C ends the answer, which is returned as far as it came.

    Args:
        opened: The model.
        ids: The prompt.
        sampling: How to choose tokens, and how many.
        say: Gets the text as it comes.
        stops: Ids that end the answer besides those of the model and its tokenizer.

    Raises:
        UserError: the prompt leaves no room in the model's context.
    """
    check_room(opened, ids)
    # prompt and answer share the context
    room = sampling.max_tokens if opened.context is None else min(sampling.max_tokens, opened.context - len(ids))
    ends = end_ids(opened.model, opened.tokenizer, stops)
    stream = _Stream(opened.tokenizer, ids, ends, say)
    began, interrupted = time.perf_counter(), False
    try:
        _generate(opened, ids, _settings(sampling, room, ends), sampling, stream)
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - began
    stream.finish()
    # the tighter of the two limits is the one that was reached
    finish: Finish = "context" if room < sampling.max_tokens else "max_tokens"
    # an answer that ended by itself is whole, even if Ctrl-C came at the same moment
    finish = "end" if stream.ended else "interrupted" if interrupted else finish
    return Answer(
        text=stream.text,
        ids=stream.ids,
        prompt_tokens=len(ids),
        finish=finish,
        seconds=seconds,
        tokens_per_second=stream.speed(),
    )


def _settings(sampling: Sampling, room: int, ends: list[int]) -> "GenerationConfig":
    from transformers import GenerationConfig

    choice: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        # top_k: transformers would otherwise keep the 50 likeliest tokens alone
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    # one prompt is never padded: the padding id only keeps transformers from a warning
    return GenerationConfig(max_new_tokens=room, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0, use_cache=True, **choice)


def _generate(opened: Opened, ids: list[int], settings: "GenerationConfig", sampling: Sampling, stream: "_Stream") -> None:
    from ...models.common.quiet import quiet_transformers

    model: Any = opened.model
    prompt = torch.tensor([ids], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    # a fork of the generator: the seed of an answer leaves the caller's random numbers alone
    with only_these_settings(model, settings), quiet_transformers(), torch.random.fork_rng(devices):
        torch.manual_seed(sampling.seed)
        model.generate(
            prompt,
            # one prompt without padding: every position counts
            attention_mask=torch.ones_like(prompt),
            generation_config=settings,
            logits_processor=real_tokens(opened.v_eff),
            streamer=stream,
        )


class _Stream:
    """Takes tokens from transformers as they are made."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt: list[int], ends: list[int], say: Callable[[str], None]) -> None:
        self.ids: list[int] = []
        self.text, self.ended = "", False
        self._decoded, self._ends, self._say = Decoded(tokenizer, prompt), frozenset(ends), say
        self._times: list[float] = []
        self._prompt_passed = False

    def put(self, value: Tensor) -> None:
        """The prompt first, then each token."""
        # transformers hands the prompt to a streamer before the first token
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        for token in value.reshape(-1).tolist():
            # before the end token is looked at, since it took as long as any other
            self._times.append(time.perf_counter())
            if token in self._ends:
                self.ended = True
                return
            self.ids.append(token)
            self._out(self._decoded.add(token))

    def end(self) -> None:
        """Called by transformers at the end; ``finish`` does the work, also after Ctrl-C."""

    def finish(self) -> None:
        """Say what is left."""
        self._out(self._decoded.rest())

    def speed(self) -> float | None:
        """Tokens per second after the first."""
        # the first token waits for the whole prompt, so it only starts the clock
        spent = self._times[-1] - self._times[0] if len(self._times) > 1 else 0.0
        return (len(self._times) - 1) / spent if spent > 0 else None

    def _out(self, text: str) -> None:
        if text:
            self.text += text
            self._say(text)
