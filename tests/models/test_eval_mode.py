"""Eval mode inside the block, and each module's own mode afterwards: for the block itself and for what is built on it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from decoct.models.batches import check_packing
from decoct.models.causality import future_leak
from decoct.models.eval_mode import eval_mode
from decoct.models.families import check_head
from decoct.models.pruning.scores import scored

USERS: dict[str, Callable[[Any], object]] = {
    "causality": future_leak,
    "head": check_head,
    "packing": lambda model: check_packing(model, "it"),
    "channel scores": lambda model: scored(model, [{"input_ids": torch.arange(8)[None]}], ["ffn"]),
}


def test_each_module_gets_its_own_mode_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    model[1].eval()
    seen: list[bool] = []

    def fail() -> None:
        with eval_mode(model):
            seen.extend(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any(seen)
    assert [module.training for module in model.modules()] == [True, True, False, False]


@pytest.mark.parametrize("use", USERS.values(), ids=USERS.keys())
def test_a_check_keeps_parts_in_eval_mode(tiny_model: Callable[..., Any], use: Callable[[Any], object]) -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    use(model)
    assert [module.training for module in model.modules()] == before
