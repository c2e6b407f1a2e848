"""Which layers stay: by block influence, greedily by the loss, or without the best contiguous block."""

import itertools
import math
from typing import Any

import pytest
import torch

from decoct.models.common.errors import NonFiniteError, UserError
from decoct.models.pruning.depth import layers_by_influence, layers_by_loss
from decoct.models.pruning.kept import Kept
from decoct.models.pruning.structured import cut
from decoct.models.pruning.text_loss import mean_loss, without_layers

from ...support.pruned_families import CONFIGS, ids, logits, tiny

TEXT = [{"input_ids": ids()}]
DEPTH = 6


def deep() -> Any:
    return tiny("llama", num_hidden_layers=DEPTH)


def test_the_layers_that_turn_the_hidden_states_least_go_and_the_ends_stay() -> None:
    influence = torch.tensor([0.0, 0.3, 0.1, 0.2, 0.3, 0.0])
    assert layers_by_influence(influence, 4) == [0, 1, 4, 5]
    assert layers_by_influence(influence, 2) == [0, 5]
    # the first of equals stays
    assert layers_by_influence(influence, 3) == [0, 1, 5]
    assert layers_by_influence(torch.tensor([0.5, 0.5]), 2) == [0, 1]
    assert influence[0] == 0, "the scores are as before"


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_layer_that_hands_on_its_input_is_a_layer_that_is_gone(kind: str) -> None:
    model = tiny(kind)
    whole = logits(model)
    with without_layers(model, [1, 3]):
        without = mean_loss(model, TEXT)
    assert torch.equal(logits(model), whole)
    assert without == pytest.approx(mean_loss(cut(model, Kept(layers=[0, 2])), TEXT), rel=1e-6)
    assert abs(without - mean_loss(model, TEXT)) > 1e-4


def test_greedy_measures_again_after_each_layer() -> None:
    model, told = deep(), list[str]()
    kept = layers_by_loss(model, TEXT, 3, "greedy_loss", told.append)
    left = list(range(DEPTH))
    while len(left) > 3:
        losses = {gone: mean_loss(cut(model, Kept(layers=[index for index in left if index != gone])), TEXT) for gone in left[1:-1]}
        left.remove(min(losses, key=losses.__getitem__))
    assert kept == left
    assert len(told) == 3
    assert "3 layers are left" in told[-1]


def test_the_contiguous_block_with_the_lowest_loss_goes() -> None:
    model, told = deep(), list[str]()
    kept = layers_by_loss(model, TEXT, 3, "contiguous", told.append)
    blocks = [[index for index in range(DEPTH) if not start <= index < start + 3] for start in (1, 2)]
    assert kept == min(blocks, key=lambda block: mean_loss(cut(model, Kept(layers=block)), TEXT))
    assert "the lowest of 2 blocks" in told[0]
    # nothing but the ends is left, so there is one block
    assert layers_by_loss(model, TEXT, 2, "contiguous") == [0, 5]


def test_the_loss_is_that_of_transformers_over_predicted_tokens_alone() -> None:
    for kind in ("gemma2", "opt"):
        # fp32: in fp64 transformers' Gemma 2 has no number for a row without any unmasked token
        model = tiny(kind, dtype=torch.float32)
        with torch.no_grad():
            expected = float(model(input_ids=ids(), labels=ids()).loss)
        assert mean_loss(model, TEXT) == pytest.approx(expected, rel=1e-5)
        mask = torch.ones_like(ids())
        mask[1, 5:] = 0
        padded = mean_loss(model, [{"input_ids": ids(), "attention_mask": mask}])
        alone = [mean_loss(model, [{"input_ids": row}]) for row in (ids()[:1], ids()[1:, :5])]
        assert padded == pytest.approx((11 * alone[0] + 4 * alone[1]) / 15, rel=1e-5)


def test_documents_of_a_window_do_not_predict_each_other() -> None:
    model = tiny("qwen2")
    packed = {"input_ids": ids().reshape(1, -1), "position_ids": torch.arange(12).repeat(2)[None]}
    assert mean_loss(model, [packed]) == pytest.approx(mean_loss(model, TEXT), rel=1e-5)


def test_a_loss_needs_two_tokens_in_a_row_and_finite_weights() -> None:
    model = tiny("llama")
    with pytest.raises(UserError, match="no two tokens in a row"):
        layers_by_loss(model, [{"input_ids": ids()[:, :1]}], 2, "contiguous")
    torch.nn.init.constant_(model.get_submodule("model.norm").weight, math.nan)
    with pytest.raises(NonFiniteError, match="the loss on the calibration text is not finite"):
        layers_by_loss(model, TEXT, 2, "greedy_loss")
    assert all("forward" not in vars(layer) for layer in model.get_submodule("model.layers")), "layers are as before"


def test_batches_do_not_change_the_loss() -> None:
    model = tiny("llama")
    rows = [{"input_ids": row[None]} for row in ids()]
    assert mean_loss(model, itertools.chain(rows)) == pytest.approx(mean_loss(model, TEXT), rel=1e-6)
