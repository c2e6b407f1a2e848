"""A cut model put back into its parent's shape computes the same, for every family, and what the record keeps is what the cut kept."""

import copy
from typing import Any

import pytest
import torch

from decoct.models.common.errors import UserError
from decoct.models.family_map import family_of
from decoct.models.pruning.expand import expand
from decoct.models.pruning.kept import Kept
from decoct.models.pruning.structured import cut
from decoct.models.sizes import sizes_of
from decoct.models.ties import is_tied

from ...support.pruned_families import LAYER_NORM, LAYERS, logits, masked_logits, tiny
from .test_structured import CASES, CUTS

# a LayerNorm's mean is over the channels that are left
EXACT = [(kind, name, kept) for kind, name, kept in CASES if kind not in LAYER_NORM or kept.hidden is None]


@pytest.mark.parametrize(("kind", "name", "kept"), EXACT, ids=[f"{kind}-{name}" for kind, name, _ in EXACT])
def test_the_expanded_model_computes_what_the_cut_one_does(kind: str, name: str, kept: Kept) -> None:
    # an epsilon that is not small beside the mean: the expanded norm must count its zeros
    changes: dict[str, Any] = {} if kind in LAYER_NORM else {"rms_norm_eps": 1e-2}
    dense = tiny(kind, **changes)
    before = sizes_of(dense.config, family_of(dense))
    student = cut(dense, kept)
    own = copy.deepcopy(student.state_dict())
    parent = expand(student, kept, before)
    expected = logits(student)
    # transformers' RMSNorm computes in fp32 whatever the weights are
    torch.testing.assert_close(logits(parent), expected, rtol=0, atol=5e-5 * float(expected.abs().max()))
    assert sizes_of(parent.config, family_of(parent)) == before
    assert is_tied(parent) == is_tied(dense)
    assert all(torch.equal(tensor, own[name]) for name, tensor in student.state_dict().items()), "the student is as before"
    again = cut(parent, kept)
    for one, two in zip(again.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_the_expanded_model_is_the_parent_with_masks() -> None:
    dense, kept = tiny("qwen3"), CUTS["all"]
    parent = expand(cut(dense, kept), kept, sizes_of(dense.config, family_of(dense)))
    expected = masked_logits(dense, kept)
    torch.testing.assert_close(logits(parent), expected, rtol=0, atol=5e-5 * float(expected.abs().max()))
    # channel 0 of layer 0 was kept, channel 1 was not
    assert torch.equal(
        parent.get_parameter("model.layers.0.mlp.up_proj.weight")[0, kept.hidden], dense.model.layers[0].mlp.up_proj.weight[0, kept.hidden]
    )
    assert not parent.get_parameter("model.layers.0.mlp.up_proj.weight")[1].any()


def test_wrong_indices_compute_something_else_or_are_refused() -> None:
    dense = tiny("llama")
    before = sizes_of(dense.config, family_of(dense))
    kept = CUTS["heads"]
    student = cut(dense, kept)
    # of another group of query heads: they would read other keys
    other = Kept(layers=kept.layers, heads=[[0, 1, 2, 3], *(kept.heads or [])[1:]])
    assert (logits(expand(student, other, before)) - logits(student)).abs().max() > 1e-3
    with pytest.raises(UserError, match=r"q_proj.* has 16 rows or columns along 'heads', and decoct.json keeps 12"):
        expand(student, Kept(layers=kept.layers, heads=[[0, 1, 2]] * LAYERS), before)


def test_channels_of_a_layer_norm_cannot_be_put_back() -> None:
    dense = tiny("gpt2")
    kept = next(kept for kind, name, kept in CASES if (kind, name) == ("gpt2", "all"))
    with pytest.raises(UserError, match="gpt2 cannot be undone"):
        expand(cut(dense, kept), kept, sizes_of(dense.config, family_of(dense)))


@pytest.mark.parametrize(("kind", "name", "kept"), CASES, ids=[f"{kind}-{name}" for kind, name, _ in CASES])
def test_a_record_gives_back_what_was_kept(kind: str, name: str, kept: Kept) -> None:
    family = family_of(tiny(kind))
    assert Kept.from_record(kept.record(family, LAYERS), family, LAYERS) == kept
