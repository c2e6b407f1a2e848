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

@parts.callback("average")
class Average(pl.Callback):
    '''Pulls every weight towards its moving average, which it remembers, with how often and at which steps it did so.'''
    def __init__(self):
        self.means, self.seen, self.strange = {}, (0, [None, True]), None
    def on_train_batch_end(self, trainer, module, *given):
        with torch.no_grad():
            for name, weight in module.student.named_parameters():
                mean = self.means.get(name)
                self.means[name] = weight.clone() if mean is None else mean * 0.5 + weight * 0.5
                weight.copy_(weight * 0.9 + self.means[name] * 0.1)
        self.seen = (self.seen[0] + 1, [0.5, "text"])
    def state_dict(self):
        return {"means": self.means, 1: self.seen, "strange": self.strange}
    def load_state_dict(self, state):
        self.means, self.seen, self.strange = state["means"], state[1], state["strange"]

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


@pytest.mark.parametrize("section", [{"name": "noise", "size": 0.01}, {"name": "average"}], ids=lambda one: one["name"])
def test_a_resumed_stage_ends_in_the_same_bits(section: dict[str, Any], make: Any, training: ModuleType, tmp_path: Path) -> None:
    def weights(work: str, *steps: int) -> dict[str, torch.Tensor]:
        for last in steps:
            # the plan, and with it the learning rates, is that of all steps; what stops early is the process
            found = make(section)
            case = training.Case(steps=8, every=4, kind="pretrain", dropout=0.0)
            hooks = list(found.hooks)
            if last < 8:
                hooks.append(Ends(last))
            try:
                result, _ = training.run_case(case, tmp_path / work, hooks=hooks, callbacks=found.lightning)
            except Ended:
                # the run that goes on has no such hook, and the hook has no state: the checkpoint does not know it
                continue
            if found.lightning:
                assert found.lightning[0].seen == (16, [0.5, "text"]), "16 micro-batches, over all starts"
            return dict(result.student.state_dict())
        raise AssertionError

    whole, resumed = weights("whole", 8), weights("resumed", 6, 8)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_state_that_is_no_data_is_refused(make: Any) -> None:
    found = make("average")
    for strange, kind in (({1}, "set"), (Path("x"), "PosixPath"), ([{"a": print}], "builtin_function_or_method")):
        found.lightning[0].strange = strange
        with pytest.raises(
            PartError, match=rf"state_dict\(\)\['strange'\].* of callback 'average' is a {kind}, which checkpoints cannot hold"
        ):
            found.hooks[0].state()


def test_a_checkpoint_of_before_callbacks_had_a_state_is_read(make: Any, training: ModuleType, tmp_path: Path) -> None:
    case = training.Case(steps=4, every=2, kind="pretrain")
    training.run_case(case, tmp_path)
    (tmp_path / "stage/checkpoints/step-00000004/state.json").write_text("{}")
    found = make("average")
    result, _ = training.run_case(case, tmp_path, hooks=found.hooks, callbacks=found.lightning)
    assert result.resumed_from == 2
    assert found.lightning[0].seen[0] == 4


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
        PartError, match=r"my_parts.py:53: callback 'nothing' made a object, which is neither a Lightning callback nor has one of"
    ):
        make("nothing")
    for name in ("present", "number"):
        (hook,) = make(name).hooks
        with pytest.raises(PartError, match=f"state\\(\\) of callback '{name}' must return tensors by name, none named 'present'"):
            hook.state()
