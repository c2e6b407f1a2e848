"""Movement pruning: scores and masks against a slow implementation, weights that return, and an exact resume."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from decoct.models.common.errors import UserError
from decoct.models.families import decoder_linears
from decoct.models.pruning.magnitude import cubic_keep
from decoct.models.pruning.pattern import Pattern
from decoct.models.pruning.selection import follows
from decoct.trainer.loop.hooks import pattern_at
from decoct.trainer.loop.movement import MovementHook
from decoct.trainer.processes.sharding import local
from decoct.trainer.settings_sparsity import MovementSettings

STEPS = 16


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: module.weight for name, module in decoder_linears(model).items()}  # pyright: ignore[reportArgumentType]


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def gradient(shape: torch.Size, step: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, hook: MovementHook, step: int) -> dict[str, np.ndarray]:
    """Takes a step on random gradients; returns the weights as the optimizer leaves them."""
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = gradient(parameter.shape, step)
    hook.before_step(step)
    optimizer.step()
    left = {name: weight.detach().double().numpy().copy() for name, weight in weights_of(model).items()}
    hook.after_step(step)
    return left


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """Mask of the largest finite scores, of equal ones the first."""
    order = [place for place in np.argsort(-scores.flatten(), kind="stable") if np.isfinite(scores.flatten()[place])]
    mask = np.zeros(scores.size, dtype=bool)
    mask[order[:count]] = True
    return mask.reshape(scores.shape)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_masks_are_those_of_summed_scores_and_pruned_weights_may_return(training: ModuleType, pattern: str | None) -> None:
    model = training.tiny_model()
    settings = MovementSettings(keep=None if pattern else 0.4, pattern=pattern, update_every=3)
    hook, optimizer = MovementHook(weights_of(model), settings, STEPS), adamw(model)
    for weight in weights_of(model).values():
        weight.data[:, ::9] = 0
    hook.on_start(model, optimizer)
    scores = {name: np.where(weight.detach().numpy() == 0, -np.inf, 0.0) for name, weight in weights_of(model).items()}
    # what a weight would be without its mask: its own value, or the one that it had when it was pruned
    latent = {name: weight.detach().double().numpy().copy() for name, weight in weights_of(model).items()}
    masks = {name: np.isfinite(score) for name, score in scores.items()}
    returned = 0
    for step in range(1, STEPS + 1):
        for name in scores:
            free = np.isfinite(scores[name])
            moved = gradient(torch.Size(latent[name].shape), step).double().numpy() * latent[name]
            scores[name][free] -= moved[free]
        left = take_step(model, optimizer, hook, step)
        keep = settings.share if step == STEPS else cubic_keep(step, STEPS, settings.share, settings.heal, settings.update_every)
        due = keep < (cubic_keep(step - 1, STEPS, settings.share, settings.heal, settings.update_every))
        for name, weight in weights_of(model).items():
            now = weight.detach().double().numpy()
            stayed = masks[name]
            # what is pruned in this step is held as the step has left it; what was pruned before has not moved
            latent[name][stayed] = left[name][stayed]
            if due:
                if pattern:
                    n = pattern_at(Pattern(2, 4), keep).kept
                    rows = scores[name].reshape(-1, 4)
                    masks[name] = np.stack([best(row, n) for row in rows]).reshape(scores[name].shape)
                else:
                    masks[name] = best(scores[name], round(keep * scores[name].size))
                returned += int((masks[name] & ~stayed).sum())
                # a weight that returns has the value that it had
                back = masks[name] & ~stayed
                assert np.array_equal(now[back], latent[name][back]), name
            assert np.array_equal(hook.masks[name].numpy(), masks[name]), (step, name)
            assert np.array_equal(now != 0, masks[name]), (step, name)
            assert np.array_equal(hook.held[name].double().numpy(), np.where(masks[name], 0, latent[name])), (step, name)
            assert weight.grad is not None and not weight.grad[~torch.from_numpy(stayed)].any()
            state = optimizer.state[weight]
            assert not state["exp_avg"][~hook.masks[name]].any() and not state["exp_avg_sq"][~hook.masks[name]].any()
    assert returned > 100
    for weight in weights_of(model).values():
        assert not weight[:, ::9].any(), "what was zero at the start stays zero"
        assert follows(weight, Pattern(2, 4)) if pattern else int((weight != 0).sum()) == round(0.4 * weight.numel())
    assert hook.reached(STEPS) and hook.reached(12) and not hook.reached(8)


@pytest.mark.parametrize("stop", [1, 5, 9, 14])
def test_a_loaded_hook_goes_on_as_if_never_stopped(training: ModuleType, stop: int) -> None:
    settings = MovementSettings(keep=0.3, update_every=4, heal=0.2)

    def run(interrupted: bool) -> dict[str, Tensor]:
        model = training.tiny_model()
        hook, optimizer = MovementHook(weights_of(model), settings, STEPS), adamw(model)
        hook.on_start(model, optimizer)
        for step in range(1, STEPS + 1):
            take_step(model, optimizer, hook, step)
            if interrupted and step == stop:
                saved = {name: local(tensor).clone() for name, tensor in hook.state().items()}
                hook = MovementHook(weights_of(model), settings, STEPS)
                hook.on_start(model, optimizer)
                hook.load(saved)
        return {**{name: local(tensor) for name, tensor in hook.state().items()}, **dict(model.named_parameters())}

    straight, resumed = run(False), run(True)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_scores_follow_the_gradients_of_the_masked_student(training: ModuleType, tmp_path: Path) -> None:
    """In the loop itself: what moved towards zero is gone, which magnitude would not have chosen."""
    case = training.Case(kind="movement", steps=12, rate=3e-2)
    _, student = training.run_case(case, tmp_path)
    before = weights_of(case.student())
    agree = []
    for name, weight in weights_of(student).items():
        assert int((weight != 0).sum()) == round(0.4 * weight.numel()), name
        by_magnitude = best(before[name].detach().abs().numpy(), round(0.4 * weight.numel()))
        agree.append(float(((weight != 0).numpy() == by_magnitude).mean()))
    # independent masks of 40 % agree in 52 %, those of magnitude in nearly all
    assert np.mean(agree) < 0.8


def test_a_checkpoint_of_other_modules_is_refused(training: ModuleType) -> None:
    model = training.tiny_model()
    hook = MovementHook(weights_of(model), MovementSettings(keep=0.5), 4)
    hook.on_start(model, adamw(model))
    with pytest.raises(UserError, match="masks other modules"):
        hook.load({"model.layers.0.mlp.up_proj.mask": torch.ones(64, 32, dtype=torch.bool)})
