"""Linears in the order in which they run, each once: parts that are shortened, and layers where that does not do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decoct.models.calibration.hessians import shared_inputs
from decoct.models.calibration.linear_order import steps_of
from decoct.models.calibration.replay import Replay
from decoct.models.common.errors import UserError
from decoct.models.families import decoder_layers
from decoct.qat.ptq import round_model

from .test_walk import GPTQ, SPEC, STEPS, RandomModel, replay_of, text_of, windows


def doubled(tensor: Tensor) -> None:
    """As layers do that add to what a part of them has given, in place."""
    tensor.mul_(2)


def outputs(replay: Replay) -> Tensor:
    """What the first layer gives for all of three batches."""
    given = [replay.run(0, number) for number in range(3)]
    return torch.cat([one for one in given if one is not None])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_steps_are_found_in_the_order_in_which_they_run(random_model: RandomModel, kind: str) -> None:
    replay, layer, linears = replay_of(random_model(kind), text_of(windows()))
    shuffled = dict(sorted(linears.items()))
    steps = steps_of(replay, 0, layer, shuffled)
    assert steps is not None
    assert [[name.removeprefix("model.layers.0.") for name in step.names] for step in steps] == STEPS
    parts = [step.part and step.part.module for step in steps]
    assert parts == [None, layer.self_attn, None, layer.mlp]
    assert not any(module._forward_hooks for module in layer.modules())


@torch.no_grad()
def test_a_shortened_part_gives_what_it_gave_and_runs_no_more(random_model: RandomModel) -> None:
    replay, layer, linears = replay_of(random_model("qwen3"), text_of(windows(10)))
    steps = steps_of(replay, 0, layer, linears)
    assert steps is not None
    layer.get_submodule("self_attn").register_forward_hook(lambda _module, _inputs, output: doubled(output[0]))
    whole = outputs(replay)
    calls: list[str] = []
    for name, linear in linears.items():
        linear.register_forward_hook(lambda *_, name=name: calls.append(name))
    for step in steps:
        if step.part is not None:
            given: list[Tensor] = []
            shared_inputs(replay, 0, {step.names[0]: linears[step.names[0]]}, True, lambda _: None, given, once=True)
            replay.shorten(step.part, given)
    for _ in range(2):
        calls.clear()
        assert torch.equal(whole, outputs(replay))
    assert not calls, "worked out once, in the pass before"
    replay.forget()
    replay.run(0, 0)
    assert len(calls) == 7 and "forward" not in vars(layer.mlp)


def test_inputs_too_wide_to_keep_are_worked_out_again(random_model: RandomModel, monkeypatch: pytest.MonkeyPatch) -> None:
    text, calls, forward = text_of(windows()), [0], nn.Linear.forward

    def counted(linear: nn.Linear, x: Tensor) -> Tensor:
        calls[0] += 1
        return forward(linear, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    kept = round_model(random_model("llama"), SPEC, GPTQ, text=text)
    # of two layers on three batches: finding the order takes every linear once; then q, k, v, o, gate and up, and down of the first
    assert calls == [2 * 7 + 3 * (2 * 6 + 1)]
    monkeypatch.setattr("decoct.models.calibration.running_order.KEPT_BYTES", 0)
    calls[0] = 0
    assert round_model(random_model("llama"), SPEC, GPTQ, text=text).state.hash() == kept.state.hash()
    assert calls == [2 * 7 + 3 * (2 * 6 + 1 + 2)]  # gate and up of the first once more


def test_layers_that_do_not_run_every_linear_once_are_calibrated_in_one_pass(random_model: RandomModel) -> None:
    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return (self.inner(x) + self.inner(x)) / 2

    text = text_of(windows())
    model = random_model("llama")
    model.set_submodule("model.layers.0.mlp.down_proj", Twice(model.get_submodule("model.layers.0.mlp.down_proj")))
    replay, layer, linears = replay_of(model, text)
    with torch.no_grad():
        assert steps_of(replay, 0, layer, linears) is None
    rounded = round_model(model, SPEC, GPTQ, text=text)
    assert len(rounded.state.modules) == 14
    assert all(error.error < error.baseline for error in rounded.errors.values())


class AddsInPlace(nn.Module):
    """What it wraps, and its input added in place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        out += x
        return out


def test_parts_that_change_what_their_linear_gives_are_run_whole(random_model: RandomModel) -> None:
    found = []
    for kept in (True, False):
        model = random_model("llama")
        for index in range(2):
            model.set_submodule(f"model.layers.{index}.mlp", AddsInPlace(model.get_submodule(f"model.layers.{index}.mlp")))
        with pytest.MonkeyPatch.context() as patch:
            if not kept:
                patch.setattr(Replay, "shorten", lambda *_: None)
            found.append(round_model(model, SPEC, GPTQ, text=text_of(windows())).state.hash())
        assert all("forward" not in vars(module) for module in model.modules())
    assert found[0] == found[1]


@torch.no_grad()
def test_hidden_states_are_not_a_layers_to_change(random_model: RandomModel) -> None:
    replay, _, _ = replay_of(model := random_model("llama"), text_of(windows(8)))
    replay.finish(0, lambda _: None)

    def adds_in_place(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].add_(1)

    decoder_layers(model)[1].register_forward_pre_hook(adds_in_place)
    one, two = (replay.run(1, 0) for _ in range(2))
    assert one is not None and two is not None and torch.equal(one, two)


def test_a_forward_of_its_own_stays_on_a_module(random_model: RandomModel) -> None:
    model = random_model("llama")
    attention = model.get_submodule("model.layers.0.self_attn")
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, **kwargs)
    mine = attention.forward
    round_model(model, SPEC, GPTQ, text=text_of(windows()))
    assert attention.forward is mine


def test_a_linear_that_reads_windows_in_chunks_is_named(random_model: RandomModel) -> None:
    class Chunks(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.inner(part) for part in x.split(16, 1)], 1)

    model = random_model("llama")
    model.set_submodule("model.layers.0.mlp", Chunks(model.get_submodule("model.layers.0.mlp")))
    with pytest.raises(UserError, match=r"mlp\.inner\.gate_proj reads 16 of 24 tokens at a time"):
        round_model(model, SPEC, GPTQ, text=text_of(windows()))


def test_a_linear_that_is_called_by_keyword_is_rounded_as_by_position(random_model: RandomModel) -> None:
    class ByKeyword(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner.down_proj(input=self.inner.act_fn(self.inner.gate_proj(input=x)) * self.inner.up_proj(input=x))

    class ByPosition(ByKeyword):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    found = []
    for kind in (ByKeyword, ByPosition):
        model = random_model("llama")
        model.set_submodule("model.layers.0.mlp", kind(model.get_submodule("model.layers.0.mlp")))
        found.append(round_model(model, SPEC, GPTQ, text=text_of(windows())).state.hash())
    assert found[0] == found[1]
