"""Gradients of the logits at the outputs of linears, in random directions whose second moment is the Fisher matrix of the softmax.

For logits z with probabilities p, F = diag(p) - p p^T is the second derivative of KL(p || p') by the logits of p', and with it the
Gauss-Newton matrix by anything before them (Martens, arXiv 1412.1193). With u = diag(sqrt p) xi - p (sqrt(p) . xi), xi of independent
random signs, E[u u^T] = F. The gradient g of u . z therefore has E[(g . d)^2] = d^T J^T F J d, twice the KL that a small change d causes.

One decoder layer at a time runs forward and backward, on stored inputs of the layers: 4 x hidden size x (layers + draws) bytes per token
on the CPU.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..families import backbone_and_head, head_transform
from .replay import Advance, Replay
from .token_rows import linear_input

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

LOGITS = 2**25
"""Largest number of logits at a time."""
Seen = tuple[Tensor, list[Tensor]]
"""The input of a linear in one call [..., in], and the gradients at its output [..., out], one per draw."""
Visit = Callable[[int, dict[str, list[Seen]]], None]


class OutputGradients:
    """States between the layers of a model on some text, and gradients at the outputs of its linears.

    Args:
        model: fp32, in eval mode, on ``device``.
        layers: Its decoder layers, in order.
        replay: Runs them.
        vocabulary: Logits that count: the first ones, without padding of the head.
        seed: Seed of the random signs.
    """

    def __init__(
        self, model: "PreTrainedModel", layers: Sequence[nn.Module], replay: Replay, *, vocabulary: int, seed: int, device: torch.device
    ) -> None:
        _, weight, bias = backbone_and_head(model)
        self._head = weight[:vocabulary].float(), None if bias is None else bias[:vocabulary].float()
        self._transform = head_transform(model.config)
        self._model, self._layers, self._replay, self._seed, self._device = model, layers, replay, seed, device
        self._states: list[list[Tensor]] = []
        """Per layer the inputs of every batch, and at the end the outputs of the last layer; on the CPU."""

    def forward(self, advance: Advance) -> None:
        """Runs all layers and keeps their inputs."""
        with torch.no_grad():
            self._states = [[self._embedded(number) for number, _ in self._replay.batches()]]
            for index in range(len(self._layers)):
                outputs = []
                for number, _ in self._replay.batches():
                    outputs.append(self.through(index, number, self._states[index][number]).cpu())
                    advance(self._replay.tokens(number))
                self._states.append(outputs)

    def _embedded(self, number: int) -> Tensor:
        """The input of the first layer."""
        seen: list[Tensor] = []

        def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        handle = self._layers[0].register_forward_pre_hook(look, with_kwargs=True)
        try:
            self._replay.run(0, number)
        finally:
            handle.remove()
        return seen[0].to("cpu", copy=True)

    def state(self, index: int, number: int) -> Tensor:
        """The input [B, S, H] of layer ``index`` for a batch; behind the last layer its output."""
        return self._states[index][number].to(self._device)

    def through(self, index: int, number: int, hidden: Tensor) -> Tensor:
        """The output of layer ``index`` for ``hidden`` [B, S, H]."""
        found = self._replay.run(index, number, hidden=hidden)
        assert found is not None
        return found

    def rows(self, number: int, hidden: Tensor) -> Tensor:
        """What the head reads of ``hidden`` [B, S, H] behind the last layer: [N, H], without padding."""
        ended = self._replay.end(number, hidden)
        kept = dict(self._replay.batches())[number]
        return ended.flatten(0, 1) if kept is None else ended[kept]

    def logits(self, rows: Tensor) -> "Iterator[Tensor]":
        """The logits [n, vocabulary] of ``rows`` [N, H] in parts, fp32."""
        weight, bias = self._head
        for part in rows.split(max(1, LOGITS // len(weight))):
            yield self._transform.apply(nn.functional.linear(part.float(), weight, bias))

    def backward(self, names: Mapping[int, Sequence[str]], draws: int, visit: Visit, advance: Advance) -> None:
        """Goes from the last layer to the first and hands on inputs and gradients, batch by batch.

        Args:
            names: Per layer the full names of its linears to look at.
            draws: Number of random directions.
            visit: Called with (layer, name -> calls) for every batch of a layer; an empty mapping follows after its last batch.
            advance: Called with the tokens of every batch.
        """
        with _frozen(self._model), torch.enable_grad():
            slopes = [self._first_slopes(number, draws) for number, _ in self._replay.batches()]
            for index in reversed(range(len(self._layers))):
                for number, _ in self._replay.batches():
                    seen, slopes[number] = self._one(index, number, names.get(index, ()), slopes[number])
                    visit(index, seen)
                    advance(self._replay.tokens(number))
                visit(index, {})

    def _first_slopes(self, number: int, draws: int) -> list[Tensor]:
        """Per draw the gradient at the output of the last layer, on the CPU."""
        signs = torch.Generator().manual_seed(self._seed + number)
        hidden = self.state(len(self._layers), number).requires_grad_()
        rows = self.rows(number, hidden)
        found: list[list[Tensor]] = [[] for _ in range(draws)]
        leaf = rows.detach().requires_grad_()
        size = max(1, LOGITS // len(self._head[0]))
        for part in leaf.split(size):
            (logits,) = self.logits(part)
            share = torch.softmax(logits.detach(), -1)
            root = share.sqrt()
            for draw in range(draws):
                sign = torch.randint(0, 2, logits.shape, generator=signs, dtype=torch.int8).to(logits.device) * 2 - 1
                one = root * sign
                one -= share * (root * one).sum(-1, keepdim=True)
                found[draw].append(torch.autograd.grad(logits, part, one, retain_graph=draw + 1 < draws)[0])
        given = [torch.cat(parts) for parts in found]
        return [torch.autograd.grad(rows, hidden, one, retain_graph=draw + 1 < draws)[0].cpu() for draw, one in enumerate(given)]

    def _one(self, index: int, number: int, names: Sequence[str], slopes: list[Tensor]) -> tuple[dict[str, list[Seen]], list[Tensor]]:
        """Inputs and gradients of a layer for one batch, and the gradients at its input."""
        calls: list[tuple[str, Tensor, Tensor]] = []

        def look(name: str) -> Callable[..., None]:
            return lambda _module, args, kwargs, output: calls.append((name, linear_input(args, kwargs), output))

        handles = [self._model.get_submodule(name).register_forward_hook(look(name), with_kwargs=True) for name in names]
        try:
            hidden = self.state(index, number).requires_grad_()
            output = self.through(index, number, hidden)
        finally:
            for handle in handles:
                handle.remove()
        seen: dict[str, list[Seen]] = {name: [] for name, _, _ in calls}
        found = [(given.detach(), []) for _, given, _ in calls]
        below = []
        for draw, slope in enumerate(slopes):
            wanted = [hidden, *(out for _, _, out in calls)]
            # an expert may have got no token, and then there is no path to it
            grads = torch.autograd.grad(output, wanted, slope.to(self._device), retain_graph=draw + 1 < len(slopes), allow_unused=True)
            below.append(grads[0].cpu())
            for (_, own), grad, (_, _, out) in zip(found, grads[1:], calls):
                own.append(torch.zeros_like(out) if grad is None else grad)
        for (name, _, _), one in zip(calls, found):
            seen[name].append(one)
        return seen, below


@contextmanager
def _frozen(model: nn.Module) -> "Iterator[None]":
    """Without gradients of parameters, which nobody reads."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
