"""Whether a model is what training and evaluation take it for: one that says nothing of a token by looking at later ones."""

from typing import TYPE_CHECKING

import torch

from .capabilities import future_setting
from .errors import UserError
from .families import backbone_and_head, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 12


@torch.no_grad()
def future_leak(model: "PreTrainedModel") -> float:
    """How far the hidden states before the last token move when that token is changed, as a share of the largest; 0.0 on the meta device.

    One forward pass of two rows of 12 tokens. NaN where the hidden states are.
    """
    backbone, weight, _ = backbone_and_head(model)
    if weight.is_meta:
        return 0.0
    ids = torch.arange(1, _TOKENS + 1, device=weight.device).remainder(weight.shape[0]).repeat(2, 1)
    ids[1, -1] = 0
    training = model.training
    model.eval()
    try:
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].float()
    finally:
        model.train(training)
    return float((hidden[0] - hidden[1]).abs().max() / hidden.abs().max().clamp(min=1.0))


def check_causal(model: "PreTrainedModel", who: str) -> None:
    """Change a later token and see that nothing before it moves.

    A model that sees the tokens it is to predict learns to copy them, and its perplexity is that of one that knows the answer.

    Args:
        who: What messages call the model, such as 'the teacher'.

    Raises:
        UserError: it sees later tokens; the message names the setting, where one of its config says so.
    """
    leak = future_leak(model)
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 3e-2
    if not leak > tolerance:
        return
    text = text_config(model.config)
    why = future_setting(model.config)
    if why is None and getattr(text, "is_decoder", None) is False:
        why = "config.json has is_decoder=false"
    remedy = "set it the other way if the model was trained so" if why else "use a causal language model"
    raise UserError(
        f"{who} (model type {text.model_type!r}) sees later tokens: changing the last of {_TOKENS} moves the hidden states before it by "
        f"{leak:.2g} of the largest{f'; {why}' if why else ''}. It would learn, and be measured, on targets that it sees; {remedy}"
    )
