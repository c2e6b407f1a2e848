"""Checks that all tokens of a text have a row in the embedding, if the tokenizer has ids without one."""

from typing import TYPE_CHECKING

import numpy as np

from ...models.common.errors import UserError
from ...models.tokenizer.vocabulary import tokens_without_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .prepared_data import PreparedData
    from .windows import Windows

# windows per pass, so that a text of any size takes little memory
_ROWS = 4096


def check_rows(data: "PreparedData", tokenizer: "PreTrainedTokenizerBase", v_eff: int) -> None:
    """Refuses text with a token that has no row in the embedding. The text is searched only if the tokenizer has such tokens.

    Args:
        data: The tokenized text.
        tokenizer: Its tokenizer.
        v_eff: Rows of the smallest embedding.

    Raises:
        UserError: the text has such a token; the message names it, its id, and how often it occurs.
    """
    # most tokenizers have none, and then the text is not read at all
    beyond = tokens_without_rows(tokenizer, v_eff)
    if not beyond:
        return
    counts = sum((_counts(windows, v_eff, max(beyond) + 1) for windows in (data.train, data.evaluation)), np.zeros(1, np.int64))
    for index, token in beyond.items():
        if count := int(counts[index - v_eff]):
            raise UserError(
                f"the text has the token {token!r} (id {index:,}) {count:,} times, but the embedding has {v_eff:,} rows, so the model "
                f"has no such token; remove it from the text, or add rows to the model (resize_token_embeddings({max(beyond) + 1}))"
            )


def _counts(windows: "Windows", first: int, end: int) -> np.ndarray:
    """int64 [end - first]: how often each of these ids occurs, padding included."""
    found = np.zeros(end - first, dtype=np.int64)
    for at in range(0, len(windows), _ROWS):
        stored = windows.rows[at : at + _ROWS]
        # -1 - id marks tokens that are not predicted, which the model still sees
        ids = np.where(stored < 0, -1 - stored, stored)
        # only ids from ``first`` on are counted, and anything beyond ``end`` is cut off
        found += np.bincount(ids[ids >= first] - first, minlength=end - first)[: end - first]
    return found
