"""What the parent predicts on some text, kept small, so that a cut model can be compared with it after the parent is gone."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..batches import backbone_inputs
from ..common.errors import NonFiniteError, UserError
from ..eval_mode import eval_mode
from ..families import backbone_and_head, head_transform
from .text_loss import CHUNK, predicted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ParentOutputs:
    """The last hidden states of a model on some text, and its head: all that its logits are made of."""

    @torch.no_grad()
    def __init__(self, model: "PreTrainedModel", batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Runs the text through ``model``, which may be released afterwards.

        Raises:
            UserError: the text has no two tokens in a row.
        """
        backbone, weight, bias = backbone_and_head(model)
        # the tensors and not the parameters: these may be emptied when the parent is cut
        self._weight, self._bias = weight.detach(), None if bias is None else bias.detach()
        self._transform = head_transform(model.config)
        self.batches = batches
        self._hidden: list[Tensor] = []
        with eval_mode(model):
            for batch in batches:
                hidden = backbone(**backbone_inputs(batch, model.device)).last_hidden_state
                # of the tokens alone that predict one; the logits of all of them would be vocabulary times as large
                self._hidden.append(hidden[predicted(batch).to(hidden.device)])
        if not sum(map(len, self._hidden)):
            raise UserError(
                "the calibration text has no two tokens in a row to compare models on; raise prune.calibration_tokens or give more text"
            )

    @torch.no_grad()
    def kl(self, student: "PreTrainedModel") -> float:
        """Mean of KL(parent || student) per predicted token, in nats, over the whole vocabulary, from fp32 logits.

        Raises:
            NonFiniteError: it is NaN or infinite.
        """
        backbone, weight, bias = backbone_and_head(student)
        transform = head_transform(student.config)
        total, tokens = 0.0, 0
        with eval_mode(student):
            for batch, expected in zip(self.batches, self._hidden):
                hidden = backbone(**backbone_inputs(batch, student.device)).last_hidden_state
                hidden = hidden[predicted(batch).to(hidden.device)]
                tokens += len(hidden)
                for start in range(0, len(hidden), CHUNK):
                    piece = slice(start, start + CHUNK)
                    theirs = self._transform.apply(nn.functional.linear(expected[piece], self._weight, self._bias).float()).log_softmax(-1)
                    own = transform.apply(nn.functional.linear(hidden[piece].to(weight.dtype), weight, bias).float()).log_softmax(-1)
                    total += float(nn.functional.kl_div(own, theirs, reduction="sum", log_target=True).double())
        if not math.isfinite(total):
            raise NonFiniteError("the KL divergence of the cut model is not finite: its weights or activations overflow")
        return total / tokens
