"""What a backbone is called with, so that the documents of a packed window stay apart for student and teacher alike."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .common.errors import UserError
from .families import backbone_and_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def backbone_inputs(batch: Mapping[str, Tensor], device: torch.device | str | None = None) -> dict[str, Any]:
    """Arguments of a backbone, or of a whole model, for ``batch``.

    Args:
        batch: ``input_ids`` and, for packed windows, ``position_ids`` that start at 0 with each document; else ``attention_mask`` where
            there is padding. Each [B, S] int64; other keys are ignored.
        device: Where the model is; None = where the batch is.

    Returns:
        For packed windows no mask: transformers then builds one from the positions in which a token sees its own document alone.
    """
    keys = ("input_ids", "position_ids") if "position_ids" in batch else ("input_ids", "attention_mask")
    given = {key: batch[key] if device is None else batch[key].to(device) for key in keys if key in batch}
    # beside a cache, which transformers makes unasked, positions would not count
    return {"attention_mask": None, "use_cache": False, **given}


@torch.no_grad()
def keeps_documents_apart(model: "PreTrainedModel") -> bool:
    """Whether the second of two packed documents gives the hidden states that it gives alone. True on the meta device, unseen."""
    backbone, weight, _ = backbone_and_head(model)
    if weight.is_meta:
        return True
    ids = torch.arange(1, 8, device=weight.device).remainder(weight.shape[0])[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=weight.device)
    training = model.training
    model.eval()
    try:
        packed, alone = (
            backbone(**backbone_inputs(batch)).last_hidden_state
            for batch in ({"input_ids": ids, "position_ids": positions}, {"input_ids": ids[:, 3:], "position_ids": positions[:, 3:]})
        )
    except TypeError:
        return False  # it knows no positions at all
    finally:
        model.train(training)
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
    error = (packed[:, 3:].float() - alone.float()).abs().max().item()
    return error <= tolerance * max(1.0, alone.float().abs().max().item())


def check_packing(model: "PreTrainedModel", who: str) -> None:
    """Run two packed documents together, and one alone, and compare.

    Raises:
        UserError: the model, named by ``who``, lets a document see the one before it.
    """
    if not keeps_documents_apart(model):
        kind: Any = model.config.model_type
        raise UserError(
            f"{who} (model type {kind!r}) does not keep packed documents apart: its attention takes no notice of positions that start "
            "again; set data.packing: false"
        )
