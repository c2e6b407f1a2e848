"""A model writes text by itself: documents from their beginning, or a user's message and an answer in its chat template.

Batch ``n`` depends on the model, the settings, the seed and ``n`` alone, so that work that was interrupted ends in the same text.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...models.common.errors import UserError
from ...models.drawing import Drawing, drawn_texts
from ...models.generation import control_token_of, decoded, end_ids
from ..settings_generation import GenerateSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MARK = "decoct0user0message0decoct"
"""Stands for the user's message while the template is taken apart; letters and digits, so that no template escapes it."""


@dataclass
class WrittenBatch:
    """Rows of one batch, with counts."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """``{"text": ...}``, or ``{"messages": [user, assistant]}``."""
    tokens: int = 0
    """Tokens of the rows that the model wrote, its end tokens included."""
    cut: int = 0
    """Rows that reached the limit before the model ended them."""
    empty: int = 0
    """Rows without text, which are left out."""


class TextWriter:
    """Writes batches of text.

    Args:
        model: In eval mode, on its device.
        tokenizer: Its tokenizer.
        settings: Length, sampling, batch.
        seed: Seed of the run.
        v_eff: Ids from here on mean no token and are never drawn.
        on_step: Called at every step of the sampling with the number of texts that it made longer.

    Raises:
        UserError: the tokenizer has no token to begin with, the chat template does not render a user's message as it is, or the documents
            are longer than the model's context.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        settings: GenerateSettings,
        seed: int,
        v_eff: int,
        on_step: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._seed, self._on_step = seed, on_step
        self._chat = writes_chats(settings, tokenizer)
        # what the model reads before its first own token, and the token that ends a message in the template
        self._start, after = self._taken_apart() if self._chat else ([self._first_token()], None)
        self._drawing = Drawing(
            ends=end_ids(model, tokenizer, [] if after is None else [after]),
            v_eff=v_eff,
            max_new_tokens=settings.document_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        self._check_length(len(self._start) + settings.document_tokens)

    def batch(self, index: int) -> WrittenBatch:
        """Batch number ``index``."""
        done = WrittenBatch()
        written = self._sample([self._start] * self._settings.batch, f"{index}/first")
        if not self._chat:
            for ids, whole in written:
                self._keep(done, {"text": decoded(self._tokenizer, ids)}, decoded(self._tokenizer, ids), len(ids) + whole, not whole)
            return done
        messages = [(decoded(self._tokenizer, ids).strip(), len(ids) + whole, whole) for ids, whole in written]
        asked = [entry for entry in messages if entry[0]]
        done.empty = len(messages) - len(asked)
        prompts = [self._prompt(text) for text, _, _ in asked]
        for (text, tokens, ended), (ids, whole) in zip(asked, self._sample(prompts, f"{index}/answer")):
            answer = decoded(self._tokenizer, ids).strip()
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            self._keep(done, {"messages": turns}, answer, tokens + len(ids) + whole, not (ended and whole))
        return done

    @staticmethod
    def _keep(done: WrittenBatch, row: dict[str, Any], text: str, tokens: int, cut: bool) -> None:
        if not text.strip():
            done.empty += 1
            return
        done.rows.append(row)
        done.tokens += tokens
        done.cut += cut

    def _sample(self, prompts: list[list[int]], label: str) -> list[tuple[list[int], bool]]:
        """(own tokens without the end token, whether the model ended by itself) of each prompt."""
        if prompts:
            self._check_length(max(map(len, prompts)) + self._settings.document_tokens)
        seed = int.from_bytes(hashlib.sha256(f"{self._seed}/{label}".encode()).digest()[:8], "little") >> 1
        return drawn_texts(self._model, prompts, self._drawing, seed, self._on_step)

    def _first_token(self) -> int:
        """Begin-of-text; the end-of-text token of models that were trained with it between documents and have no other."""
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if isinstance(token, int):
                return token
        raise UserError("data.generate: the tokenizer has neither a begin-of-text nor an end-of-text token to start from; give data.files")

    def _taken_apart(self) -> tuple[list[int], int | None]:
        """The template's tokens before a user's message, and the control token behind it."""
        rendered = str(self._tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False))
        before, mark, after = rendered.partition(_MARK)
        if not mark:
            raise UserError(
                "data.generate: the chat template does not render a user's message as it is; let the model write documents instead "
                "(data.generate.start: text), or give data.files"
            )
        return self._ids(before), control_token_of(self._tokenizer, after)

    def _prompt(self, message: str) -> list[int]:
        turns = [{"role": "user", "content": message}]
        return self._ids(str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)))

    def _ids(self, text: str) -> list[int]:
        ids: Any = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)

    def _check_length(self, length: int) -> None:
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(context, int) and length > context:
            raise UserError(
                f"data.generate.document_tokens={self._settings.document_tokens:,} and what stands before them take {length:,} tokens, and "
                f"the model's context is {context:,}; give a smaller number"
            )


def writes_chats(settings: GenerateSettings, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether conversations are written and not documents.

    Raises:
        UserError: ``start`` is chat, and the tokenizer has no chat template.
    """
    if settings.start == "chat" and not tokenizer.chat_template:
        raise UserError("data.generate.start is 'chat', and the tokenizer has no chat template; use text, or leave the key out")
    return settings.start == "chat" or (settings.start == "auto" and bool(tokenizer.chat_template))
