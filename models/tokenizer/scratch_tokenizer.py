"""Trains a tokenizer on the user's text: byte-level BPE with GPT-2's pre-tokenizer.

The alphabet contains every byte, so decoding restores any text, and llama.cpp's ``gpt-2`` type splits text in the same way.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB = 257
"""256 bytes and one special token."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer; the same texts in the same order give the same tokenizer.

    Args:
        texts: Documents; read once.
        vocab_size: Number of tokens, including the 256 bytes and ``<|endoftext|>`` (id 0: bos, eos and pad). A short text gives fewer.

    Raises:
        UserError: ``vocab_size`` below 257, or no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: byte-level BPE needs at least {MIN_VOCAB} (256 bytes, 1 special token)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # untrimmed: the places of tokens in the text include leading spaces
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # first, so that it has the id 0
        special_tokens=[END_OF_TEXT],
        # sorted: the library returns the alphabet in no fixed order
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = _Counted(texts)
    tokenizer.train_from_iterator(seen, trainer)
    if seen.characters == 0:
        raise UserError("there is no text to train a tokenizer on; check the recipe's data")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        # without token_type_ids, which decoders do not take
        model_input_names=["input_ids", "attention_mask"],
    )


class _Counted:
    """Passes texts on and counts their characters, so that an empty iterator shows after a single pass."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.characters += len(text)
            yield text
