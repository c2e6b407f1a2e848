"""The real vocabulary: the tokens that the tokenizer can produce, without the padding of the embedding table.

V_eff = highest token id + 1, or the number of embedding rows if the tokenizer has larger ids (Gemma 3's image token in its text models, a
pad token added without resizing); text must not contain those. Logits are sliced to V_eff before any softmax, so teacher and student
heads may be padded to different sizes as long as their tokenizers map every id to the same token.
"""

from typing import TYPE_CHECKING

from ..common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SHOWN = 3


def _tokens_by_id(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def effective_vocab(tokenizer: "PreTrainedTokenizerBase", *rows: int | None) -> int:
    """V_eff: the highest id of the tokenizer + 1, added tokens included, limited by the embedding ``rows`` per model (None: unknown)."""
    tokens = _tokens_by_id(tokenizer)
    if not tokens:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no tokens; give a folder with a whole tokenizer")
    # 2**31 only keeps min from failing where no rows are known
    return min(max(tokens) + 1, *(count for count in rows if count is not None), 2**31)


def embedding_rows(config: "PreTrainedConfig") -> int | None:
    """Number of embedding rows of a model; None if the config does not give it."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def tokens_without_rows(tokenizer: "PreTrainedTokenizerBase", v_eff: int) -> dict[int, str]:
    """Tokens without an embedding row, by ascending id; usually {}."""
    return {index: token for index, token in sorted(_tokens_by_id(tokenizer).items()) if index >= v_eff}


def check_same_vocabulary(teacher_tokenizer: "PreTrainedTokenizerBase", student_tokenizer: "PreTrainedTokenizerBase") -> int:
    """V_eff of two tokenizers that map every id to the same token. They are compared by content, not by class or size.

    Raises:
        UserError: a token differs. The message names the first such ids and both sizes.
    """
    teacher, student = _tokens_by_id(teacher_tokenizer), _tokens_by_id(student_tokenizer)
    # ids of either side: a token that only one of them has differs too
    differing = sorted(index for index in teacher.keys() | student.keys() if teacher.get(index) != student.get(index))
    if differing:
        examples = "; ".join(
            f"id {index}: teacher {_show(teacher.get(index))}, student {_show(student.get(index))}" for index in differing[:_SHOWN]
        )
        raise UserError(
            f"teacher and student have different vocabularies ({len(teacher):,} and {len(student):,} tokens; {len(differing):,} differ): "
            f"{examples}; distillation compares the two models token by token, so give a student with the teacher's tokenizer"
        )
    # either side: they are the same
    return effective_vocab(teacher_tokenizer)


def check_head_rows(model: "PreTrainedModel", v_eff: int) -> None:
    """Refuse a model whose head or embedding has fewer rows than the vocabulary has tokens; more rows (padding) are fine."""
    # both: a tied model has one table, an untied one may have been resized on one side only
    tables = {"output head": model.get_output_embeddings(), "input embedding": model.get_input_embeddings()}
    for what, module in tables.items():
        weight = getattr(module, "weight", None)
        if weight is None:
            raise UserError(f"{type(model).__name__} has no {what}; decoct works on causal language models")
        if weight.shape[0] < v_eff:
            raise UserError(
                f"the {what} of {type(model).__name__} has {weight.shape[0]:,} rows but its tokenizer has ids up to {v_eff - 1:,}; "
                "model and tokenizer do not belong together (or tokens were added without resizing the embeddings)"
            )


def _show(token: str | None) -> str:
    return "nothing" if token is None else repr(token)
