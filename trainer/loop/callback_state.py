"""State of a Lightning callback in checkpoints: what its ``state_dict`` returns, as JSON and tensors. Nothing is pickled."""

import json
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...parts import Part, PartError
from ..processes.world import bytes_of_first

_BLOB, _JSON = "state", "json"
# words that say what a JSON list of two stands for, since JSON knows neither tuples nor keys other than text
_LIST, _TUPLE, _DICT, _TENSOR = "list", "tuple", "dict", "tensor"


class CallbackState:
    """A hook that saves and restores the state of a Lightning callback, and does nothing else.

    The state of rank 0 is saved, as Lightning does, and restored on every rank.

    Args:
        part: The imported part that made the callback.
        callback: The callback.
    """

    optional = True
    """Checkpoints of versions that kept no state of callbacks are read without it."""

    def __init__(self, part: Part, callback: pl.Callback) -> None:
        self.name = f"own-{part.name}"
        self._part = part
        self._callback = callback

    @staticmethod
    def has_state(callback: pl.Callback) -> bool:
        """Whether a callback has a state of its own."""
        return type(callback).state_dict is not pl.Callback.state_dict

    def on_start(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Nothing to prepare."""

    def before_step(self, step: int) -> None:
        """Nothing to do."""

    def after_step(self, step: int) -> None:
        """Nothing to do."""

    def state(self) -> dict[str, Tensor]:
        """The state of rank 0's callback as uint8 (all ranks call this).

        Raises:
            PartError: it holds anything but numbers, text, truth values, None, lists, tuples, dictionaries and whole tensors.
        """
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        text = json.dumps(self._packed(self._callback.state_dict(), tensors, "state_dict()"))
        tensors[_JSON] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        # ranks may count differently, and all must save tensors of the same size
        blob = bytes_of_first(save(tensors))
        return {_BLOB: torch.frombuffer(bytearray(blob), dtype=torch.uint8)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Hands the saved state to the callback's ``load_state_dict``."""
        if _BLOB not in state:
            return
        from safetensors.torch import load

        tensors = load(bytes(state[_BLOB].cpu().numpy()))
        text = bytes(tensors.pop(_JSON).numpy()).decode()
        self._callback.load_state_dict(_unpacked(json.loads(text), tensors))

    def _packed(self, value: Any, tensors: dict[str, Tensor], where: str) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) in (list, tuple):
            kind = _LIST if isinstance(value, list) else _TUPLE
            return [kind, [self._packed(one, tensors, f"{where}[{at}]") for at, one in enumerate(value)]]
        if isinstance(value, dict):
            pairs = [[self._packed(key, tensors, where), self._packed(one, tensors, f"{where}[{key!r}]")] for key, one in value.items()]
            return [_DICT, pairs]
        if isinstance(value, Tensor) and not isinstance(value, DTensor):
            name = str(len(tensors))
            # copied: two tensors may share memory, which a file cannot
            tensors[name] = value.detach().cpu().contiguous().clone()
            return [_TENSOR, name]
        raise PartError(
            f"{self._part.place}: {where} of callback '{self._part.name}' is a {type(value).__name__}, which checkpoints cannot hold; "
            "return numbers, text, lists, tuples, dictionaries and whole tensors"
        )


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, held = value
    if kind == _TENSOR:
        return tensors[held]
    if kind == _DICT:
        return {_unpacked(key, tensors): _unpacked(one, tensors) for key, one in held}
    items = [_unpacked(one, tensors) for one in held]
    return items if kind == _LIST else tuple(items)
