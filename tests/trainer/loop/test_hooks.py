from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from decoct.models.common.errors import UserError
from decoct.models.families import decoder_linears
from decoct.models.pruning.magnitude import cubic_keep, zero_masks
from decoct.trainer.loop.hooks import KeepZeros, MaskHook
from decoct.trainer.processes.sharding import local
from decoct.trainer.settings_pruning import MagnitudeSettings


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: module.weight for name, module in decoder_linears(model).items()}  # pyright: ignore[reportArgumentType]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, hook: KeepZeros, step: int) -> None:
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
    hook.before_step(step)
    optimizer.step()
    hook.after_step(step)


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def test_zeros_survive_steps_in_weights_and_moments(training: ModuleType) -> None:
    model = training.tiny_model()
    for weight in _weights(model).values():
        weight.data[weight.data.abs() < 0.015] = 0
    masks = zero_masks({name: weight.detach() for name, weight in _weights(model).items()})
    optimizer = _adamw(model)
    # moments from before the hook, which would move the zeros
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, weight in _weights(model).items():
        weight.data.mul_(masks[name])
    hook = KeepZeros(masks)
    hook.on_start(model, optimizer)
    for step in range(1, 4):
        _step(model, optimizer, hook, step)
    for name, weight in _weights(model).items():
        removed = ~masks[name]
        assert removed.any()
        assert weight[removed].abs().max() == 0, name
        assert weight.grad is not None
        assert weight.grad[removed].abs().max() == 0, name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[weight][moment][removed].abs().max() == 0, (name, moment)
            assert optimizer.state[weight][moment][~removed].abs().min() > 0, (name, moment)


def test_masks_follow_the_schedule_and_only_shrink(training: ModuleType) -> None:
    model = training.tiny_model()
    names = list(_weights(model))
    settings = MagnitudeSettings(keep=0.3, update_every=2, heal=0.25)
    told: list[tuple[int, float]] = []
    hook = MaskHook(names, settings, 20, tell=lambda step, keep: told.append((step, keep)))
    optimizer = _adamw(model)
    hook.on_start(model, optimizer)
    before = {name: mask.clone() for name, mask in hook.masks.items()}
    for step in range(1, 21):
        _step(model, optimizer, hook, step)
        keep = cubic_keep(step, 20, 0.3, 0.25, 2)
        for name, mask in hook.masks.items():
            assert int(mask.sum()) == round(keep * mask.numel()), (step, name)
            assert not (mask & ~before[name]).any(), "a pruned weight never returns"
            assert int(_weights(model)[name].count_nonzero()) == int(mask.sum()), (step, name)
        before = {name: mask.clone() for name, mask in hook.masks.items()}
    assert told[-1] == (14, 0.3)
    assert [step for step, _ in told] == list(range(2, 15, 2))


def test_only_named_modules_are_pruned(training: ModuleType) -> None:
    model = training.tiny_model()
    chosen = "model.layers.1.mlp.up_proj"
    hook = MaskHook([chosen], MagnitudeSettings(keep=0.5, heal=0.0, update_every=1), 1)
    optimizer = _adamw(model)
    hook.on_start(model, optimizer)
    _step(model, optimizer, hook, 1)
    assert {name for name, weight in _weights(model).items() if (weight == 0).any()} == {chosen}


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_a_loaded_hook_goes_on_as_if_never_stopped(training: ModuleType, stop: int) -> None:
    settings = MagnitudeSettings(keep=0.3, update_every=4, heal=0.2)

    def run(interrupted: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = training.tiny_model()
        optimizer = _adamw(model)
        hook = MaskHook(list(_weights(model)), settings, 12)
        hook.on_start(model, optimizer)
        for step in range(1, 13):
            _step(model, optimizer, hook, step)
            if interrupted and step == stop:
                saved = {name: local(tensor).clone() for name, tensor in hook.state().items()}
                hook = MaskHook(list(_weights(model)), settings, 12)
                hook.on_start(model, optimizer)
                hook.load(saved)
        return {name: local(mask) for name, mask in hook.state().items()}, {
            name: weight.detach() for name, weight in _weights(model).items()
        }

    straight, resumed = run(False), run(True)
    for part in (0, 1):
        assert straight[part].keys() == resumed[part].keys()
        assert all(torch.equal(straight[part][name], resumed[part][name]) for name in straight[part])


def test_a_quantized_linear_masks_inside_its_forward(training: ModuleType) -> None:
    from decoct.qat.layers.quantized_model import prepare
    from decoct.qat.spec import QuantSpec

    model = training.tiny_model()
    prepare(model, QuantSpec(bits=4, group_size=16))
    name = "model.layers.0.self_attn.q_proj"
    mask = torch.rand(_weights(model)[name].shape) < 0.5
    _weights(model)[name].data.mul_(mask)
    KeepZeros([name]).on_start(model, _adamw(model))
    module = model.get_submodule(name)
    module.weight.data.fill_(1.0)  # only the mask in the forward can stop these now
    assert torch.equal(module(torch.eye(32)).T != 0, mask)


def test_unknown_modules_and_foreign_masks_are_refused(training: ModuleType) -> None:
    model = training.tiny_model()
    with pytest.raises(UserError, match=r"model\.nowhere has a mask, but the model has no linear layer"):
        KeepZeros(["model.nowhere"]).on_start(model, _adamw(model))
    with pytest.raises(UserError, match=r"model\.norm"):
        MaskHook(["model.norm"], MagnitudeSettings(keep=0.5), 4).on_start(model, _adamw(model))
    hook = KeepZeros(_weights(model))
    hook.on_start(model, _adamw(model))
    with pytest.raises(UserError, match="masks other modules"):
        hook.load({"model.layers.0.mlp.up_proj": torch.ones(64, 32, dtype=torch.bool)})
