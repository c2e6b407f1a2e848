"""Runs one decoder layer at a time on stored hidden states, so that each layer sees the outputs of the quantized layers before it.

Every run calls the whole backbone with the layers before skipped, because the backbone makes masks, positions and whatever else its
family passes to a layer. The output of a layer is kept on the CPU in fp32, 4 x hidden size bytes per token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..batches import backbone_inputs
from ..common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]
Advance = Callable[[int], None]


class Enough(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """Ends a forward pass after the requested layer, or inside it when a hook has seen all inputs it needs."""


@dataclass(frozen=True, kw_only=True)
class Remedies:
    """What a user can do where a model cannot be calibrated, as ends of sentences. The method that calibrates knows them."""

    linear: str
    """A linear has no inputs that could be measured."""
    layer: str
    """A decoder layer does not run."""
    overflow: str
    """Inputs are not finite."""


@dataclass(frozen=True)
class Part:
    """A module inside a layer that returns the output of its last linear. With that linear's input the rest of it need not run again."""

    module: nn.Module
    linear: str
    """Full module name."""
    nones: int | None
    """How many Nones the module returns in a tuple after its tensor; None = it returns the bare tensor."""


@dataclass
class _Shortened:
    part: Part
    tensors: list[Tensor]
    """Per batch the input of the part's linear, and after the first pass its output."""
    done: list[bool]
    """Per batch whether ``tensors`` holds the output."""


class Replay:
    """Runs the decoder layers of a model one after the other over the same batches.

    Args:
        model: In eval mode; everything outside its layers is on ``device``, each layer when it runs.
        layers: Its decoder layers, in order.
        batches: As ``backbone_inputs`` takes them, with ``attention_mask`` where there is padding.
        device: Device of the computation.
        remedies: What to do where that is impossible.
    """

    def __init__(
        self, model: "PreTrainedModel", layers: Sequence[nn.Module], batches: Sequence[Batch], device: torch.device, remedies: Remedies
    ) -> None:
        self.remedies = remedies
        self._model, self._backbone = model, model.base_model
        self._layers, self._batches, self._device = layers, batches, device
        self._hidden: list[Tensor | None] = [None] * len(batches)
        self._shortened: list[_Shortened] = []
        self._behind: dict[int, int | None] = {}
        """Per layer how many values it returns in a tuple after its tensor; None = it returns the bare tensor."""

    def batches(self) -> Iterator[tuple[int, Tensor | None]]:
        """Yields (number, mask) of every batch: mask is bool [B, S], True for text, or None if there is no padding."""
        for number in range(len(self._batches)):
            yield number, self.mask(number)

    @property
    def positions(self) -> int:
        """Tokens of all batches, with padding."""
        return sum(batch["input_ids"].numel() for batch in self._batches)

    @property
    def all_tokens(self) -> int:
        """Tokens of all batches, without padding."""
        return sum(self.tokens(number) for number in range(len(self._batches)))

    def mask(self, number: int) -> Tensor | None:
        """bool [B, S] of a batch on the device, True for text, or None if there is no padding."""
        batch = self._batches[number]
        kept = batch["attention_mask"].bool() if "attention_mask" in batch else None
        return None if kept is None or bool(kept.all()) else kept.to(self._device)

    def hold(self, hidden: Sequence[Tensor]) -> None:
        """Replaces the stored hidden states by [B, S, H] on the CPU per batch: what the next layer that runs reads."""
        self._hidden = list(hidden)

    def held(self) -> list[Tensor]:
        """The stored hidden states of every batch, after at least one ``finish``."""
        return [hidden for hidden in self._hidden if hidden is not None]

    def first_inputs(self) -> list[Tensor]:
        """What the first layer reads of every batch, in fp32 on the CPU."""
        found: list[Tensor] = []

        def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args[0] if args else kwargs["hidden_states"]).to("cpu", torch.float32, copy=True))
            raise Enough

        for number in range(len(self._batches)):
            handle = self._layers[0].register_forward_pre_hook(look, with_kwargs=True)
            try:
                self.run(0, number)
            finally:
                handle.remove()
        return found

    def shorten(self, part: Part, inputs: Sequence[Tensor]) -> None:
        """Until ``forget``, replaces a part of the current layer by its last linear applied to ``inputs``, one tensor per batch.

        The modules that computed these inputs must not change until then.
        """
        self._shortened.append(_Shortened(part, list(inputs), [False] * len(inputs)))

    def forget(self) -> None:
        """Makes every part of a layer run again."""
        self._shortened.clear()

    def run(self, index: int, number: int, few: tuple[int, int] | None = None, hidden: Tensor | None = None) -> Tensor | None:
        """Runs layer ``index`` on the stored hidden states of batch ``number``, or on ``few`` of its (rows, first tokens).

        Args:
            index: Number of the layer.
            number: Number of the batch.
            few: (rows, first tokens) of the batch to run on.
            hidden: [B, S, H] in place of the stored hidden states. It may have an autograd graph, which the output then continues.

        Returns:
            The layer's output [B, S, H], or None if a hook raised ``Enough``.
        """
        # None before the first layer: the backbone then embeds the tokens itself
        given, result, layer = self._hidden[number] if hidden is None else hidden, [], self._layers[index]
        batch = self._batches[number]
        # the first tokens of some rows: an examination of the layer needs no more
        if few is not None:
            rows, tokens = few
            batch = {key: tensor[:rows, :tokens] for key, tensor in batch.items()}
            given = None if given is None else given[:rows, :tokens]

        def give(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if given is None:
                return None
            # copied because some layers add to their input in place, and the stored states are needed again
            hidden = given.to(self._device, copy=True)
            # families pass hidden states by position or by name
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        def take(_module: nn.Module, _args: Any, output: Any) -> None:
            # noted for later runs, in which this layer is skipped and must return a tuple of the same length
            self._behind[index] = len(output) - 1 if isinstance(output, tuple) else None
            result.append(output[0] if isinstance(output, tuple) else output)
            raise Enough

        handles = [layer.register_forward_pre_hook(give, with_kwargs=True), layer.register_forward_hook(take)]
        try:
            # the layers before pass their input through, so only layer ``index`` computes; ``Enough`` ends the pass behind it
            with _skipped(self._layers[:index], self._behind), _replaced(self._short_forwards(number)):
                self._backbone(**backbone_inputs(batch, self._device))
        except Enough:
            return result[0] if result else None
        finally:
            for handle in handles:
                handle.remove()
        raise UserError(f"decoder layer {index} of {type(self._backbone).__name__} did not run; {self.remedies.layer}")

    def end(self, number: int, hidden: Tensor) -> Tensor:
        """The backbone's output [B, S, H] for batch ``number``, with ``hidden`` [B, S, H] as the output of its last layer.

        That layer has run before. It runs what follows the layers, such as the last norm, and continues the autograd graph of ``hidden``.
        """
        last, nones = self._layers[-1], self._behind[len(self._layers) - 1]

        def forward(*_args: Any, **_kwargs: Any) -> Any:
            return hidden if nones is None else (hidden, *[None] * nones)

        with _skipped(self._layers[:-1], self._behind), _replaced([(last, forward)]):
            return self._backbone(**backbone_inputs(self._batches[number], self._device)).last_hidden_state

    def _short_forwards(self, number: int) -> list[tuple[nn.Module, Callable[..., Any]]]:
        return [(known.part.module, partial(self._short, known, number)) for known in self._shortened]

    def _short(self, known: _Shortened, number: int, *_args: Any, **_kwargs: Any) -> Any:
        """Output of a shortened part for a batch, computed once. It is a copy: some layers, such as Falcon's, add to it in place."""
        if known.done[number]:
            tensor = known.tensors[number].to(self._device, copy=True)
        else:
            tensor = self._model.get_submodule(known.part.linear)(known.tensors[number].to(self._device))
            # the output replaces the input, which is not needed any more
            known.tensors[number], known.done[number] = tensor.to("cpu", copy=True), True
        return tensor if known.part.nones is None else (tensor, *[None] * known.part.nones)

    def finish(self, index: int, advance: Advance) -> None:
        """Replaces the stored hidden states of every batch by the output of layer ``index``; calls ``forget``."""
        for number, _ in self.batches():
            hidden = self.run(index, number)
            assert hidden is not None
            # one batch at a time: its old states are freed when its new ones are stored
            self._hidden[number] = hidden.to("cpu", torch.float32)
            advance(self.tokens(number))
        self.forget()

    def shape(self, number: int) -> tuple[int, ...]:
        """[B, S] of a batch."""
        return tuple(self._batches[number]["input_ids"].shape)

    def tokens(self, number: int) -> int:
        """Tokens of a batch, without padding."""
        batch = self._batches[number]
        return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


@contextmanager
def _skipped(layers: Sequence[nn.Module], behind: Mapping[int, int | None]) -> Iterator[None]:
    """Makes ``layers`` return their input, which needs no weights, with as many Nones after it as each layer returned values."""

    def hand_on(nones: int | None) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
            return hidden_states if nones is None else (hidden_states, *[None] * nones)

        return forward

    with _replaced([(layer, hand_on(behind.get(index))) for index, layer in enumerate(layers)]):
        yield


@contextmanager
def _replaced(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replaces the forward of modules."""
    # other code, such as fused kernels, may also have set a forward on the module: it is put back afterwards
    before = [(module, module.__dict__.get("forward")) for module, _ in forwards]
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.forward
            else:
                module.forward = own
