"""Arguments of a backbone, so that the documents of a packed window do not see each other in student and teacher."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .common.errors import UserError
from .eval_mode import eval_mode
from .families import backbone_and_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def backbone_inputs(batch: Mapping[str, Tensor], device: torch.device | str | None = None) -> dict[str, Any]:
    """Arguments of a backbone, or of a whole model, for ``batch``.

    Args:
        batch: ``input_ids`` and, for packed windows, ``position_ids`` that start at 0 in each document; else ``attention_mask`` if there
            is padding. Each [B, S] int64; other keys are ignored.
        device: Device of the model; None = that of the batch.

    Returns:
        The arguments. Packed windows get no mask: transformers then builds one from the positions, by which a token sees only its own
        document.
    """
    # not both: with positions, transformers finds the documents by itself, and packed windows have no padding
    keys = ("input_ids", "position_ids") if "position_ids" in batch else ("input_ids", "attention_mask")
    given = {key: batch[key] if device is None else batch[key].to(device) for key in keys if key in batch}
    # transformers makes a cache by default in eval mode, and with a cache it ignores the positions: documents would see each other
    return {"attention_mask": None, "use_cache": False, **given}


@torch.no_grad()
def keeps_documents_apart(model: "PreTrainedModel") -> bool:
    """Whether the second of two packed documents has the same hidden states as alone. True, without a run, on the meta device."""
    backbone, weight, _ = backbone_and_head(model)
    if weight.is_meta:
        return True
    # two documents of 3 and 4 tokens in one window; all ids differ, so a leak from the first changes the second
    ids = torch.arange(1, 8, device=weight.device).remainder(weight.shape[0])[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=weight.device)
    try:
        with eval_mode(model):
            packed, alone = (
                backbone(**backbone_inputs(batch)).last_hidden_state
                for batch in ({"input_ids": ids, "position_ids": positions}, {"input_ids": ids[:, 3:], "position_ids": positions[:, 3:]})
            )
    except TypeError:
        # the backbone takes no position_ids at all
        return False
    # packed and alone run in different shapes, so bf16 rounds differently; a leak is far larger
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
    error = (packed[:, 3:].float() - alone.float()).abs().max().item()
    return error <= tolerance * max(1.0, alone.float().abs().max().item())


def check_packing(model: "PreTrainedModel", who: str) -> None:
    """Runs two packed documents together and one alone, and compares.

    Raises:
        UserError: the model, named by ``who``, lets a document see the one before it.
    """
    if not keeps_documents_apart(model):
        kind: Any = model.config.model_type
        raise UserError(
            f"{who} (model type {kind!r}) does not keep packed documents apart: its attention ignores positions that start "
            "again; set data.packing: false"
        )
