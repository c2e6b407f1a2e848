"""Ranges that rounders follow through a stage: a moving average of what each step saw, kept through a stop."""

import pytest
import torch
from torch import nn

from decoct.qat.fake_quant import static_scale
from decoct.qat.layers.input_hooks import RoundedInputs, round_inputs
from decoct.qat.spec import ActivationSpec
from decoct.trainer.loop.static_ranges import FollowedRanges

STATIC = ActivationSpec(scaling="static")


def made(spec: ActivationSpec = STATIC) -> tuple[nn.Module, RoundedInputs, FollowedRanges]:
    model = nn.Sequential(nn.Linear(4, 4))
    inputs = round_inputs(model, ["0"], spec)
    return model, inputs, FollowedRanges(inputs, "ranges")


def test_a_tenth_of_each_step_enters_the_average_and_micro_batches_count_together() -> None:
    model, inputs, ranges = made()
    ranges.start()
    steps = [torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(step)) * (step + 1) for step in range(3)]
    low = high = torch.zeros(())
    for number, step in enumerate(steps):
        for micro in step.split(1 + number):
            model(micro)
        ranges.follow()
        low = step.min() if number == 0 else low + 0.1 * (step.min() - low)
        high = step.max() if number == 0 else high + 0.1 * (step.max() - high)
        scale, _ = static_scale(low, high, STATIC)
        assert torch.allclose(inputs.scales()["0"], scale, rtol=1e-6)
    other_model, other, resumed = made()
    resumed.load(ranges.state())
    assert torch.equal(other.scales()["0"], inputs.scales()["0"])
    other_model.load_state_dict(model.state_dict())
    assert torch.equal(other_model(steps[0]), model(steps[0]))


def test_nothing_is_followed_where_scales_are_taken_in_the_forward() -> None:
    model, inputs, ranges = made(ActivationSpec())
    ranges.start()
    model(torch.randn(2, 4))
    ranges.follow()
    assert ranges.state() == {} and inputs.scales() == {}
    ranges.load({})


@pytest.mark.parametrize("on", [True, False])
def test_switching_off_lets_everything_pass(on: bool) -> None:
    model, _, ranges = made(ActivationSpec())
    x = torch.randn(2, 4)
    rounded = model(x)
    ranges.enable(on)
    assert torch.equal(model(x), rounded) is on
