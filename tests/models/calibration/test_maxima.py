"""Largest magnitudes of inputs beside a slow form of them, and what cannot be measured."""

from typing import Any

import pytest
import torch

from decoct.models.calibration.maxima import channel_maxima
from decoct.models.calibration.replay import Replay
from decoct.models.common.errors import NonFiniteError, UserError
from decoct.models.families import decoder_layers
from decoct.qat.ptq.walk import REMEDIES

from ...support.pruned_families import VOCABULARY, tiny

NAME = "model.layers.0.mlp.down_proj"


def batches() -> list[dict[str, Any]]:
    ids = torch.randint(1, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(3))
    # the second batch is padding alone
    masks = [torch.ones(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)]
    masks[0][0, 7:] = 0
    return [{"input_ids": ids[at : at + 2], "attention_mask": mask} for at, mask in zip((0, 2), masks)]


def measured(model: Any, given: list[dict[str, Any]], names: tuple[str, ...] = (NAME,)) -> tuple[dict[str, torch.Tensor], int]:
    done: list[int] = []
    replay = Replay(model, decoder_layers(model), given, torch.device("cpu"), REMEDIES)
    with torch.no_grad():
        found = channel_maxima(replay, 0, {name: model.get_submodule(name) for name in names}, done.append)
    return found, sum(done)


def test_maxima_are_those_of_the_text_without_padding() -> None:
    model, given = tiny("llama", dtype=torch.float32), batches()
    found, done = measured(model, given)
    seen: list[torch.Tensor] = []
    model.get_submodule(NAME).register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**given[0])
    expected = seen[0][given[0]["attention_mask"].bool()].abs().amax(0)
    torch.testing.assert_close(found[NAME], expected)
    assert bool((seen[0].abs().amax((0, 1)) > expected).any()), "padding would have counted"
    assert done == Replay(model, decoder_layers(model), given, torch.device("cpu"), REMEDIES).all_tokens


def test_an_input_that_is_not_finite_is_named() -> None:
    model = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = float("inf")
    with pytest.raises(NonFiniteError, match=f"the inputs of {NAME} are NaN or infinite"):
        measured(model, batches())


def test_a_linear_that_does_not_run_is_named() -> None:
    model = tiny("llama", dtype=torch.float32)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj did not run on the calibration text"):
        measured(model, batches(), ("model.layers.1.mlp.down_proj",))
