"""Layers that round their weight in every forward pass: linears, the embedding, and a head that is tied to it.

They keep the parameters of the module they are made from and may add their own: one scale per group (LSQ), zero points, and a low-rank
adapter whose product is added to the weight before rounding.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..spec import QuantSpec
from .rounded import Extras as Extras
from .rounded import Mode as Mode
from .rounded import RoundedWeight as RoundedWeight


class QuantLinear(RoundedWeight, nn.Linear):
    """``nn.Linear`` whose weight goes through fake quantization in every forward pass, in training and in evaluation."""

    def __init__(self, linear: nn.Linear, spec: QuantSpec, extras: Extras | None = None) -> None:
        # on the meta device: nothing is allocated, no random number is drawn
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        # the same parameter: optimizers, ties and names in the state dict stay as they are
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.set_spec(spec, extras)
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(input, self.quantized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.spec_repr()}"


class QuantEmbedding(RoundedWeight, nn.Embedding):
    """``nn.Embedding`` with a rounded table [vocabulary, hidden]; the groups of a token's row run along hidden."""

    def __init__(self, embedding: nn.Embedding, spec: QuantSpec, extras: Extras | None = None) -> None:
        rows, columns = embedding.weight.shape
        super().__init__(rows, columns, padding_idx=embedding.padding_idx, device="meta")
        self.weight = embedding.weight
        self.set_spec(spec, extras)
        self.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        """[...] token ids -> [..., hidden]."""
        return F.embedding(input, self.quantized_weight(), self.padding_idx)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.spec_repr()}"


class TiedHead(nn.Linear):
    """A head that multiplies by the rounded table of a ``QuantEmbedding``; its ``weight`` is the embedding's parameter."""

    def __init__(self, head: nn.Linear, embedding: QuantEmbedding) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight
        self.register_parameter("bias", head.bias)
        # in a list, so that torch does not register the embedding as a child of the head
        self._embedding = [embedding]
        self.train(head.training)

    def quantized_weight(self) -> Tensor:
        """[vocabulary, hidden]: the rounded table of the embedding."""
        return self._embedding[0].quantized_weight()

    def forward(self, input: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocabulary]."""
        return F.linear(input, self.quantized_weight(), self.bias)
