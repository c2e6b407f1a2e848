"""One decoder layer at a time on stored hidden states, so that a layer runs once it and all before it are as they will be served.

The backbone itself is called every time, with the layers before skipped: it makes masks, positions and whatever else its family hands
to a layer. What a layer gave is kept on the CPU in fp32, 4 x hidden bytes a token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...models.batches import backbone_inputs
from ...models.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]
Advance = Callable[[int], None]


class Enough(Exception):  # noqa: N818 - it ends a forward pass whose rest nobody needs
    """Raised behind the layer that was asked for, or inside it by a hook that has seen all it wanted."""


class Replay:
    """Runs the decoder layers of a model one after the other over the same batches.

    Args:
        model: In eval mode; everything outside its layers is on ``device``, each layer when it runs.
        layers: Its decoder layers, in order.
        batches: As ``backbone_inputs`` takes them, with ``attention_mask`` where there is padding.
        device: Where it runs.
    """

    def __init__(self, model: "PreTrainedModel", layers: Sequence[nn.Module], batches: Sequence[Batch], device: torch.device) -> None:
        self._backbone, self._layers, self._batches, self._device = model.base_model, layers, batches, device
        self._hidden: list[Tensor | None] = [None] * len(batches)
        self._tuples = False

    def batches(self) -> Iterator[tuple[int, Tensor | None]]:
        """(number, bool [B, S], True for text, or None when all is text) of every batch."""
        for number, batch in enumerate(self._batches):
            kept = batch["attention_mask"].bool() if "attention_mask" in batch else None
            yield number, None if kept is None or bool(kept.all()) else kept.to(self._device)

    def run(self, index: int, number: int) -> Tensor | None:
        """Layer ``index`` on batch ``number``, whose hidden states the layers before have left: its output [B, S, H]; None when a hook
        has raised ``Enough``."""
        given, result, layer = self._hidden[number], [], self._layers[index]

        def give(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if given is None:
                return None
            hidden = given.to(self._device)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        def take(_module: nn.Module, _args: Any, output: Any) -> None:
            self._tuples = isinstance(output, tuple)
            result.append(output[0] if self._tuples else output)
            raise Enough

        handles = [layer.register_forward_pre_hook(give, with_kwargs=True), layer.register_forward_hook(take)]
        try:
            with _skipped(self._layers[:index], self._tuples):
                self._backbone(**backbone_inputs(self._batches[number], self._device))
        except Enough:
            return result[0] if result else None
        finally:
            for handle in handles:
                handle.remove()
        raise UserError(f"decoder layer {index} of {type(self._backbone).__name__} never ran; use method rtn or mse, which run nothing")

    def finish(self, index: int, advance: Advance) -> None:
        """Put what layer ``index`` gives for every batch in the place of what it was given."""
        for number, _ in self.batches():
            hidden = self.run(index, number)
            assert hidden is not None
            self._hidden[number] = hidden.to("cpu", torch.float32)
            advance(self.tokens(number))

    def tokens(self, number: int) -> int:
        """Tokens of a batch, padding left out."""
        batch = self._batches[number]
        return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


@contextmanager
def _skipped(layers: Sequence[nn.Module], tuples: bool) -> Iterator[None]:
    """Let ``layers`` hand on what they are given, whether their weights are there or not."""

    def hand_on(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (hidden_states,) if tuples else hidden_states

    for layer in layers:
        layer.forward = hand_on
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
