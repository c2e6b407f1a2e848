"""Writes a stream of tokens as windows of both sides: training and held out."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...models.common.errors import UserError
from ..settings import DataSettings
from .split import Split, held_out_of_a_run, held_out_only, split_documents
from .tokens import TokenStream
from .windows import Windows, write_labelled, write_packed, write_padded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLABELLED = "windows in which nothing is to be learned"
UNUSED = "tokens that fill no window, or lie beyond data.eval_tokens"


def write_sides(
    settings: DataSettings,
    tokenizer: "PreTrainedTokenizerBase",
    stream: TokenStream,
    folder: Path,
    left_out: Counter[str],
    *,
    train: bool,
) -> Split:
    """Writes ``train`` and ``evaluation`` into ``folder``.

    Args:
        settings: Window length, packing and size of the held-out side.
        tokenizer: Gives the id of padding.
        stream: All tokens.
        folder: Folder for the windows.
        left_out: Receives the numbers of tokens and windows that are on neither side.
        train: Whether there is a training side; if not, all of the text may be held out.

    Returns:
        The split.

    Raises:
        UserError: a side has no window with a token to predict.
    """
    length, most = settings.seq_length, None if settings.eval_tokens == "all" else settings.eval_tokens
    # padding is never predicted or attended to, so every id with a row in the embedding will do; the lower of the two, because a pad token
    # that was added later may have no row
    padding = min((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), default=0)
    labelled = settings.kind == "chat"
    if train:
        assert most is not None, "prepare_data refuses it"
        split = split_documents(stream, seq_length=length, eval_tokens=most, packing=settings.packing, held_out=settings.held_out_rule)
    elif most is not None and settings.held_out_rule == "blocks":
        split = held_out_of_a_run(stream, seq_length=length, eval_tokens=most, packing=settings.packing)
    else:
        split = held_out_only(stream, eval_tokens=most)
    # the held-out side first and with a limit; training takes everything that it leaves
    sides = [("evaluation", split.evaluation, most), ("train", split.train, None)]
    counts: dict[str, int] = {}
    dropped = 0
    for side, documents, limit in sides:
        path = folder / side
        windows = None if limit is None else max(1, limit // length)
        empty = 0
        if not settings.packing:
            counts[side], empty = write_padded(path, stream.tokens, documents, length, padding, limit, labelled=labelled)
        # plain text is full of tokens to predict: whole runs of documents are copied without looking at each window
        elif train and not labelled:
            counts[side] = write_packed(path, stream.tokens, documents, length, windows)
        else:
            # evaluation alone may use all of a short text, so its last window is filled up; training leaves these tokens out
            end = None if train else padding
            counts[side], empty = write_labelled(path, stream.tokens, documents, length, windows, padding=end)
        dropped += empty
        if settings.packing and (unused := int(np.diff(documents).sum()) - Windows.open(path, length).tokens - empty * length) > 0:
            left_out[UNUSED] += unused
    if dropped:
        left_out[UNLABELLED] += dropped
    if not counts["evaluation"] or (train and not counts["train"]):
        _refuse(counts, dropped, length)
    return split


def _refuse(counts: dict[str, int], dropped: int, length: int) -> None:
    found = f"{counts['train']} training and {counts['evaluation']} evaluation windows"
    if dropped:
        raise UserError(
            f"data: nothing is to be learned in {dropped:,} windows of data.seq_length={length:,}, which leaves {found}: prompts fill "
            "whole windows. Raise data.seq_length beyond the prompts, give more conversations, or learn prompts too "
            "(data.mask_prompts: false)"
        )
    raise UserError(f"the documents are too short: {found} of two or more tokens; give more text")
