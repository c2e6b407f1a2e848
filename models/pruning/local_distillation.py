"""Local distillation: each decoder layer of a pruned student learns to give its parent's output, one layer at a time.

No gradient crosses a layer, so the layers need neither each other nor the head: memory holds the student, one layer of the parent and the
hidden states of the text. Of a model whose hidden width was cut, inputs and targets are the channels that stay. The error of a token is
``||student - parent||^2 / ||parent||^2`` over its channels, so that the few tokens with huge hidden states do not outweigh all others.

Source: blockwise local distillation of Puzzle (arXiv 2411.19146), there with a normalised MSE over all tokens.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..calibration.replay import Advance, Batch, Remedies, Replay
from ..common.errors import NonFiniteError
from ..eval_mode import eval_mode
from ..families import decoder_layers
from ..family_map import family_of
from .kept import Kept
from .parent_layers import ParentLayers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LocalInputs = Literal["student", "parent"]
"""What a layer reads while it learns: the outputs of the student's layers before it, whose errors it can then make up for, or what its
parent reads."""
WARMUP = 0.05
"""Share of a layer's steps in which its rate rises; from there it falls to 0 along a cosine."""
CLIP = 1.0
"""Largest norm of a layer's gradient."""
_REMEDIES = Remedies(linear="leave 'local' out", layer="leave 'local' out", overflow="Take an earlier checkpoint")


@dataclass(frozen=True, kw_only=True)
class LocalHow:
    """How each layer learns."""

    learning_rate: float
    """Peak rate of AdamW, without weight decay."""
    epochs: int
    """Passes over the text."""
    seed: int
    """The order of the batches is drawn from it."""
    inputs: LocalInputs = "student"
    """What a layer reads while it learns."""


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """What local distillation did to one layer of the student."""

    layer: int
    """Number in the student."""
    parent: int
    """Layer of the parent whose output it learns."""
    before: float
    """Mean error of a token of the held-out text, a share of the squared norm."""
    after: float
    kept: bool
    """Whether the error is lower; otherwise the layer is as before."""

    def record(self) -> dict[str, Any]:
        """For the stage's facts."""
        return {"layer": self.layer, "parent": self.parent, "error_before": self.before, "error_after": self.after, "kept": self.kept}


class Ledger(Protocol):
    """Finished layers of an earlier start."""

    def get(self, layer: int) -> tuple[LayerResult, dict[str, Tensor]] | None:
        """Result and parameters (by their name in the layer) of a finished layer; None if it is not finished."""
        ...

    def put(self, result: LayerResult, weights: Mapping[str, Tensor]) -> None:
        """Keep a finished layer."""
        ...


class NoLedger:
    """Keeps nothing."""

    def get(self, layer: int) -> None:
        """Nothing is finished."""

    def put(self, result: LayerResult, weights: Mapping[str, Tensor]) -> None:
        """Nothing is kept."""


def amount_of_work(how: LocalHow, layers: int, parent_layers: int, fit_tokens: int, held_out_tokens: int) -> int:
    """The total of all calls of ``advance``: tokens through layers of the parent, and of the student in training, before and after."""
    learnt = layers * (how.epochs * fit_tokens + 2 * held_out_tokens)
    passed = parent_layers + (layers - 1 if how.inputs == "student" else 0)
    return learnt + passed * (fit_tokens + held_out_tokens)


def distill_layers(
    student: "PreTrainedModel",
    parent: ParentLayers,
    kept: Kept,
    fit: Sequence[Batch],
    held_out: Sequence[Batch],
    how: LocalHow,
    *,
    sparse: Iterable[str] = (),
    ledger: Ledger | None = None,
    advance: Advance = lambda tokens: None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[LayerResult]:
    """Trains the layers of ``student`` in place, one after the other.

    A kept layer that is followed by dropped ones learns the output after these, which is what the next kept layer of the parent reads.

    Args:
        student: The cut or masked model, in fp32, whole on one device.
        parent: The layers of the model that it was made of.
        kept: What the student has of the parent.
        fit: Batches of text that the layers learn on; each is an optimizer step.
        held_out: Batches that decide whether a layer's result is kept.
        how: Rate, epochs and seed.
        sparse: Linears of the student whose exact zeros are a mask: they stay zero.
        ledger: Finished layers of an earlier start; their results are taken over, and the parent alone runs there.
        advance: Called with tokens that passed a layer; the total is ``amount_of_work``.
        tell: Gets a line per layer.

    Raises:
        NonFiniteError: an error is NaN or infinite.
        UserError: a layer does not run.
    """
    layers, ledger, masked = decoder_layers(student), ledger or NoLedger(), set(sparse)
    family = family_of(student)
    batches = [*fit, *held_out]
    counts = [int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel() for batch in batches]
    replay = Replay(student, layers, batches, student.device, _REMEDIES)
    results: list[LayerResult] = []
    with eval_mode(student):
        for position, states in enumerate(parent.states(kept.layers, batches, advance)):
            names = {name.removeprefix(f"{family.layers_path}.{position}."): name for name in masked}
            layer = _Layer(replay, position, layers[position], counts, len(fit), how, kept.hidden, set(names) & _linears(layers[position]))
            if how.inputs == "parent" or position == 0:
                replay.hold(layer.chosen(states.inputs))
            found = ledger.get(position)
            if found is None:
                result = layer.learn(states.outputs, states.layer, advance)
                ledger.put(result, dict(layers[position].named_parameters()))
                told = f"{result.before:.2e} -> {result.after:.2e}, {'kept' if result.kept else 'not kept'}"
                tell(f"  layer {position} (of the parent {kept.layers[position]}): error on held-out windows {told}")
            else:
                result, weights = found
                layer.load(weights)
                layer.advance_whole(advance)
            results.append(result)
            with torch.no_grad():
                if how.inputs == "student" and position + 1 < len(layers):
                    replay.finish(position, advance)
                elif found is not None:
                    # later layers run with this one skipped, which needs to know what it returns
                    replay.run(position, 0, few=(1, 16))
    return results


def _linears(layer: nn.Module) -> set[str]:
    return {name for name, _ in layer.named_modules()}


@dataclass
class _Layer:
    """The work on one layer of the student."""

    replay: Replay
    position: int
    layer: nn.Module
    counts: Sequence[int]
    fitted: int
    """Batches of ``counts`` that are learnt from; the others are held out."""
    how: LocalHow
    hidden: list[int] | None
    sparse: set[str]
    """Linears of the layer, by their name in it, whose zeros stay."""

    def chosen(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The channels of the parent's hidden states that the student has."""
        return list(states) if self.hidden is None else [part[..., self.hidden] for part in states]

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Writes the parameters of the layer."""
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                parameter.copy_(weights[name])

    def advance_whole(self, advance: Advance) -> None:
        """Counts the work that an earlier start has done."""
        advance(self.how.epochs * sum(self.counts[: self.fitted]) + 2 * sum(self.counts[self.fitted :]))

    def learn(self, outputs: Sequence[Tensor], parent: int, advance: Advance) -> LayerResult:
        """Trains the layer on what ``replay`` holds, and undoes it if its error on the held-out batches is not lower."""
        targets = self.chosen(outputs)
        start = {name: parameter.detach().clone() for name, parameter in self.layer.named_parameters()}
        before = self._held_out(targets, advance)
        self._train(targets, advance)
        after = self._held_out(targets, advance)
        if not math.isfinite(before):
            raise NonFiniteError(f"layer {self.position}: the hidden states overflow on the calibration text")
        # an error that is not a number is not lower
        better = after < before
        if not better:
            self.load(start)
        return LayerResult(layer=self.position, parent=parent, before=before, after=after, kept=better)

    def _train(self, targets: Sequence[Tensor], advance: Advance) -> None:
        parameters = list(self.layer.parameters())
        sparse = [self.layer.get_parameter(f"{name}.weight") for name in sorted(self.sparse)]
        masks = [(weight, weight != 0) for weight in sparse]
        optimizer = torch.optim.AdamW(parameters, lr=self.how.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        steps = self.how.epochs * self.fitted
        rising = max(1, round(WARMUP * steps))
        # seeds have 64 bits
        order = torch.Generator().manual_seed((self.how.seed + self.position) % 2**63)
        for parameter in parameters:
            parameter.requires_grad_(True)
        step = 0
        for _ in range(self.how.epochs):
            for number in torch.randperm(self.fitted, generator=order).tolist():
                step += 1
                rate = min(step / rising, 0.5 * (1 + math.cos(math.pi * (step - 1) / steps)))
                for group in optimizer.param_groups:
                    group["lr"] = self.how.learning_rate * rate
                # the backbone outside the layer gets no gradient
                with torch.enable_grad():
                    error = self._error(number, targets[number]) / max(1, self.counts[number])
                gradients = torch.autograd.grad(error, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients):
                    parameter.grad = gradient
                nn.utils.clip_grad_norm_(parameters, CLIP)
                optimizer.step()
                with torch.no_grad():
                    for weight, mask in masks:
                        weight.mul_(mask)
                advance(self.counts[number])
        for parameter in parameters:
            parameter.grad = None

    @torch.no_grad()
    def _held_out(self, targets: Sequence[Tensor], advance: Advance) -> float:
        total = 0.0
        for number in range(self.fitted, len(targets)):
            total += float(self._error(number, targets[number]).double())
            advance(self.counts[number])
        return total / max(1, sum(self.counts[self.fitted :]))

    def _error(self, number: int, target: Tensor) -> Tensor:
        """Sum of the errors of a batch's tokens."""
        own = self.replay.run(self.position, number)
        assert own is not None
        wanted = target.to(own.device)
        squares = (own.float() - wanted).square().sum(-1)
        share = squares / wanted.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        kept = self.replay.mask(number)
        return share.sum() if kept is None else share[kept].sum()
