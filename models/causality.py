"""Checks that a model is causal, as training and evaluation assume: its predictions do not depend on later tokens."""

from typing import TYPE_CHECKING

import torch

from .capabilities import future_setting
from .common.errors import UserError
from .eval_mode import eval_mode
from .families import backbone_and_head, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# enough for several tokens before the last, few enough to cost nothing
_TOKENS = 12


@torch.no_grad()
def future_leak(model: "PreTrainedModel") -> float:
    """Largest change of the hidden states before the last token when that token changes, as a share of the largest hidden state.

    It takes one forward pass of two rows of 12 tokens. It is 0.0 on the meta device, and NaN if hidden states are NaN.
    """
    backbone, weight, _ = backbone_and_head(model)
    if weight.is_meta:
        return 0.0
    # two equal rows [2, 12]; the second gets another last token below
    ids = torch.arange(1, _TOKENS + 1, device=weight.device).remainder(weight.shape[0]).repeat(2, 1)
    # 0 occurs at no other position, as the ids begin with 1
    ids[1, -1] = 0
    with eval_mode(model):
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].float()
    # relative to the states, which differ by orders of magnitude between families; an absolute floor keeps tiny states from dividing noise
    return float((hidden[0] - hidden[1]).abs().max() / hidden.abs().max().clamp(min=1.0))


def future_reason(model: "PreTrainedModel") -> str | None:
    """'it sees later tokens', with the setting that causes it; None for a causal model. Found by changing a later token."""
    # rounding in bf16 may differ with the batch; a leak is far larger
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 3e-2
    # NaN compares false: hidden states with NaN are reported by other checks, not as a leak
    if not future_leak(model) > tolerance:
        return None
    why = future_setting(model.config)
    return "it sees later tokens" + (f": {why}" if why else "")


def check_causal(model: "PreTrainedModel", who: str) -> None:
    """Checks that changing a later token changes nothing before it.

    A model that sees the tokens it must predict learns to copy them, and its perplexity means nothing.

    Args:
        model: The model.
        who: Name of the model in messages, such as 'the teacher'.

    Raises:
        UserError: the model sees later tokens; the message names the setting of its config that causes it, if there is one.
    """
    if reason := future_reason(model):
        # a colon means that a setting is named
        remedy = "set it the other way if the model was trained so" if ":" in reason else "use a causal language model"
        raise UserError(
            f"{who}, model type {text_config(model.config).model_type!r}: {reason}. Changing the last of {_TOKENS} tokens changes its "
            f"predictions before it, so it would be trained and measured on targets that it sees; {remedy}"
        )
