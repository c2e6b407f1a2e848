"""Shape of a scratch teacher: a small Llama. It imports no torch, because plans ask for it."""

from typing import Any

from ..models.common.errors import UserError
from ..models.settings import ScratchSettings


def scratch_fields(settings: ScratchSettings, v_eff: int, context: int, end: int | None = None) -> dict[str, Any]:
    """Fields of the config of a scratch teacher.

    Args:
        settings: Shape of the model.
        v_eff: Size of its vocabulary.
        context: Length of the longest window in tokens.
        end: Id of the end-of-text token.

    Raises:
        UserError: ``hidden`` is not divisible by ``heads``, or ``heads`` not by ``kv_heads``.
    """
    if settings.hidden % settings.heads or settings.heads % settings.kv_heads:
        raise UserError(
            f"teacher.scratch: hidden={settings.hidden} must be divisible by heads={settings.heads}, "
            f"and heads by kv_heads={settings.kv_heads}; change one of the three"
        )
    return {
        # no padding rows: ids and rows of embedding and head are the same number
        "vocab_size": v_eff,
        "hidden_size": settings.hidden,
        "intermediate_size": settings.ffn,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "head_dim": settings.hidden // settings.heads,
        # 2048 as a minimum, so that serving runtimes accept prompts longer than the training window
        "max_position_embeddings": max(context, 2048),
        "tie_word_embeddings": settings.tie_embeddings,
        # The usual 0.02 suits widths of thousands; a narrow model starts too flat with it (docs/lab-book.md).
        "initializer_range": settings.hidden**-0.5,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": None,
    }
