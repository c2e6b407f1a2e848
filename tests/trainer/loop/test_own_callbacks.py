"""Callbacks that a recipe imports: hooks with a state of their own, and Lightning callbacks."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from decoct.parts import PartError
from decoct.trainer.loop.own_callbacks import OwnCallbacks, own_callbacks

from ...support.own_parts import parts_of_text

FILE = """
import lightning.pytorch as pl

@parts.callback("noise")
class Noise:
    '''Moves every weight after each step by a number that it remembers.'''
    def __init__(self, *, size: float = 1e-3):
        self.size, self.moved, self.calls = size, torch.zeros(()), []
    def on_start(self, student, optimizer):
        self.calls.append("start")
        self.weights = list(student.parameters())
    def before_step(self, step):
        self.calls.append(f"before {step}")
    def after_step(self, step):
        self.calls.append(f"after {step}")
        self.moved = self.moved * 0.9 + self.size
        with torch.no_grad():
            for weight in self.weights:
                weight.add_(self.moved)
    def state(self):
        return {"moved": self.moved}
    def load(self, state):
        self.calls.append("load")
        self.moved = state["moved"]

@parts.callback("counts")
class Counts(pl.Callback):
    def __init__(self):
        self.batches = 0
    def on_train_batch_end(self, *given):
        self.batches += 1

@parts.callback("nothing")
def nothing():
    return object()

@parts.callback("present")
class Present:
    def state(self): return {"present": torch.ones(1)}

@parts.callback("number")
class Number:
    def state(self): return {"a": 1.0}
"""


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """make(name or section, ...): the callbacks of a stage."""
    found = parts_of_text(tmp_path, FILE)

    def build(*sections: Any) -> OwnCallbacks:
        chosen = [{"name": one} if isinstance(one, str) else one for one in sections]
        made: list[Any] = [found.settings("callback", one["name"]) for one in chosen]
        return own_callbacks([settings(**one) for settings, one in zip(made, chosen)])

    return build


def test_a_hook_is_called_around_every_step_and_a_lightning_callback_by_lightning(make: Any, training: ModuleType, tmp_path: Path) -> None:
    found = make("noise", "counts")
    case = training.Case(steps=3, kind="pretrain", windows=8, micro=4)
    training.run_case(case, tmp_path, hooks=found.hooks, callbacks=found.lightning)
    (hook,), (lightning,) = found.hooks, found.lightning
    assert hook._target.calls == ["start", "before 1", "after 1", "before 2", "after 2", "before 3", "after 3"]
    assert lightning.batches == 6


def test_a_resumed_stage_ends_in_the_same_bits(make: Any, training: ModuleType, tmp_path: Path) -> None:
    def weights(work: str, *steps: int) -> dict[str, torch.Tensor]:
        for last in steps:
            # the plan, and with it the learning rates, is that of all steps; what stops early is the process
            found = make({"name": "noise", "size": 0.01})
            case = training.Case(steps=8, every=4, kind="pretrain", dropout=0.0)
            hooks = list(found.hooks)
            if last < 8:
                hooks.append(Ends(last))
            try:
                result, _ = training.run_case(case, tmp_path / work, hooks=hooks)
            except Ended:
                # the run that goes on has no such hook, and the hook has no state: the checkpoint does not know it
                continue
            return dict(result.student.state_dict())
        raise AssertionError

    whole, resumed = weights("whole", 8), weights("resumed", 6, 8)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class Ended(Exception):  # noqa: N818 - it ends the process of a test
    pass


class Ends:
    """Ends the training after a step."""

    name = "ends"

    def __init__(self, last: int) -> None:
        self.last = last

    def on_start(self, student: Any, optimizer: Any) -> None: ...

    def before_step(self, step: int) -> None: ...

    def after_step(self, step: int) -> None:
        if step == self.last:
            raise Ended

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def load(self, state: Any) -> None: ...


def test_what_is_no_callback_is_refused_with_its_place(make: Any) -> None:
    with pytest.raises(
        PartError, match=r"my_parts.py:36: callback 'nothing' made a object, which is neither a Lightning callback nor has one of"
    ):
        make("nothing")
    for name in ("present", "number"):
        (hook,) = make(name).hooks
        with pytest.raises(PartError, match=f"state\\(\\) of callback '{name}' must return tensors by name, none named 'present'"):
            hook.state()
