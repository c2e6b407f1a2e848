"""Hooks that round what linears read: dynamic and static, and the ranges behind static scales."""

from typing import Literal

import pytest
import torch
from torch import nn

from decoct.models.common.errors import UserError
from decoct.qat.fake_quant import fake_quant_activation, static_scale
from decoct.qat.layers.input_hooks import round_inputs, round_inputs_as_stored
from decoct.qat.layers.rounders import Padding, Rounder
from decoct.qat.spec import ActivationSpec


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))


def first(made: nn.Sequential) -> nn.Linear:
    linear = made[0]
    assert isinstance(linear, nn.Linear)
    return linear


def plain_first(made: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, first(made).weight, first(made).bias)


def test_dynamic_inputs_are_rounded_token_by_token_and_can_be_let_pass() -> None:
    made, x = model(), torch.randn(2, 5, 8)
    plain = made(x)
    inputs = round_inputs(made, ["0"], ActivationSpec())
    assert torch.equal(made(x), made[1](plain_first(made, fake_quant_activation(x, ActivationSpec()))))
    inputs.enable(False)
    assert torch.equal(made(x), plain)
    assert not inputs.scales()


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_scales_come_from_the_range_that_was_seen(symmetric: bool) -> None:
    made, spec = model(), ActivationSpec(scaling="static", symmetric=symmetric)
    inputs = round_inputs(made, ["0"], spec)
    inputs.observe()
    batches = [torch.randn(3, 8), 2 * torch.randn(4, 8)]
    for x in batches:
        assert torch.equal(first(made)(x), plain_first(made, x)), "without a range everything passes"
    inputs.set_ranges(inputs.extremes())
    whole = torch.cat(batches)
    scale, zero = static_scale(whole.min(), whole.max(), spec)
    assert torch.equal(inputs.scales()["0"], scale)
    assert (zero is None) == symmetric and inputs.zeros().keys() == (set() if symmetric else {"0"})
    again = model()
    round_inputs_as_stored(again, ["0"], spec, inputs.scales(), inputs.zeros())
    assert torch.equal(again(batches[0]), made(batches[0]))
    assert not torch.equal(again(batches[0]), model()(batches[0]))


def test_a_module_that_read_nothing_is_named() -> None:
    made = model()
    inputs = round_inputs(made, ["0", "1"], ActivationSpec(scaling="static"))
    inputs.observe()
    first(made)(torch.randn(1, 8))
    with pytest.raises(UserError, match="1 did not run"):
        inputs.extremes()


def test_gradients_reach_what_lies_before() -> None:
    made = model()
    round_inputs(made, ["1"], ActivationSpec())
    made(torch.randn(3, 8)).sum().backward()
    gradient = first(made).weight.grad
    assert gradient is not None and gradient.any()


def test_padding_has_no_part_in_the_range() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            return self.linear(x)

    made, x = Backbone(), torch.randn(2, 5, 8)
    x[1, 3:] = 100.0
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    inputs = round_inputs(made, ["linear"], ActivationSpec(scaling="static"))
    inputs.observe()
    made(x, attention_mask=mask)
    text = x[mask.bool()]
    assert torch.equal(inputs.extremes(), torch.stack([-text.min(), text.max()])[None])
    inputs.observe()
    made(x)
    assert float(inputs.extremes()[0, 1]) == 100.0


def test_a_batch_of_padding_alone_leaves_the_range_as_it_is() -> None:
    padding = Padding()
    rounder = Rounder(ActivationSpec(scaling="static"), padding)
    rounder.observing = True
    padding.text = torch.zeros(2, 5, dtype=torch.bool)
    rounder.note(torch.randn(2, 5, 8))
    assert rounder.extremes is None
    padding.text = torch.ones(2, 5, dtype=torch.bool)
    rounder.note(torch.full((2, 5, 8), 3.0))
    padding.text = torch.zeros(2, 5, dtype=torch.bool)
    rounder.note(torch.full((2, 5, 8), 9.0))
    assert rounder.extremes is not None
    assert rounder.extremes.tolist() == [-3.0, 3.0]


@pytest.mark.parametrize("scaling", ["dynamic", "static"])
def test_an_input_by_keyword_is_rounded_as_one_by_position(scaling: Literal["dynamic", "static"]) -> None:
    made, x = model(), torch.randn(3, 8)
    inputs = round_inputs(made, ["0"], ActivationSpec(scaling=scaling))
    inputs.observe()
    first(made)(input=x)
    assert torch.equal(inputs.extremes(), torch.stack([-x.min(), x.max()])[None])
    if scaling == "static":
        inputs.set_ranges(inputs.extremes())
    assert torch.equal(first(made)(input=x), first(made)(x))
    assert not torch.equal(first(made)(input=x), plain_first(made, x))
