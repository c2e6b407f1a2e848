"""Scores of channels, heads, hidden channels and layers mean what they say, whatever the batches are."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from decoct.models.axis_map import Axis
from decoct.models.common.errors import NonFiniteError, UserError
from decoct.models.family_map import family_of
from decoct.models.pruning.choose import kept_by
from decoct.models.pruning.kept import Kept
from decoct.models.pruning.scores import Scores, scored
from decoct.models.pruning.structured import cut, sliced
from decoct.models.sizes import ChannelScore, Sizes, sizes_of

from ...support.pruned_families import CONFIGS, FFN, HEADS, HIDDEN, KEYS, LAYERS, WIDTH, ids, logits, tiny

AXES: tuple[Axis, ...] = ("ffn", "heads", "kv_heads", "hidden")
SCORES: tuple[ChannelScore, ...] = ("weight_activation", "activation", "magnitude", "taylor")
TEXT = [{"input_ids": ids()}]
GROUP = HEADS // KEYS


def inputs_of(model: Any, name: str) -> Tensor:
    """What a module reads on ``ids()``."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, given: seen.append(given[0].detach()))
    logits(model)
    handle.remove()
    return seen[0].double()


@pytest.mark.parametrize("score", ["weight_activation", "activation"])
def test_activations_of_channels_and_heads(score: ChannelScore) -> None:
    model = tiny("qwen3", dtype=torch.float32)
    found = scored(model, TEXT, AXES, score=score)

    def numbers(read: Tensor, *weights: Tensor) -> Tensor:
        if score == "activation":
            return read.abs().mean(1).square().sum(0).sqrt()
        return torch.cat([weight.detach().double() for weight in weights]).norm(dim=0) * read.abs().mean((0, 1))

    layer = model.model.layers[2]
    channels = numbers(inputs_of(model, "model.layers.2.mlp.down_proj"), layer.mlp.down_proj.weight)
    torch.testing.assert_close(found.axes["ffn"][2], channels.float())
    heads = numbers(inputs_of(model, "model.layers.2.self_attn.o_proj"), layer.self_attn.o_proj.weight).view(HEADS, WIDTH)
    torch.testing.assert_close(found.axes["heads"][2], heads.norm(dim=1).float())
    torch.testing.assert_close(found.axes["kv_heads"][2], heads.view(KEYS, GROUP * WIDTH).norm(dim=1).float())
    attention = layer.self_attn
    read = numbers(
        inputs_of(model, "model.layers.2.self_attn.q_proj"), attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
    ) + numbers(inputs_of(model, "model.layers.2.mlp.gate_proj"), layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
    torch.testing.assert_close(found.hidden[2], read.float())
    torch.testing.assert_close(found.hidden[-1], numbers(inputs_of(model, "lm_head"), model.lm_head.weight).float())
    torch.testing.assert_close(found.hidden_of([0, 2]), found.hidden[0] + found.hidden[2] + found.hidden[-1])


def test_magnitude_is_the_norm_of_all_matrix_elements_that_are_cut_together() -> None:
    model = tiny("phi3", dtype=torch.float32)
    found = scored(model, [], AXES, score="magnitude")
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    inner = {name.removeprefix("model.layers.1."): tensor for name, tensor in state.items() if name.startswith("model.layers.1.")}
    gate, up = inner["mlp.gate_up_proj.weight"].chunk(2)
    channels = gate.square().sum(1) + up.square().sum(1) + inner["mlp.down_proj.weight"].square().sum(0)
    torch.testing.assert_close(found.axes["ffn"][1], channels.sqrt().float())
    query, key, value = inner["self_attn.qkv_proj.weight"].split([HEADS * WIDTH, KEYS * WIDTH, KEYS * WIDTH])
    heads = (query.square().sum(1) + inner["self_attn.o_proj.weight"].square().sum(0)).view(HEADS, WIDTH).sum(1)
    torch.testing.assert_close(found.axes["heads"][1], heads.sqrt().float())
    groups = heads.view(KEYS, GROUP).sum(1) + (key.square().sum(1) + value.square().sum(1)).view(KEYS, WIDTH).sum(1)
    torch.testing.assert_close(found.axes["kv_heads"][1], groups.sqrt().float())
    whole = state["model.embed_tokens.weight"].square().sum(0) + state["lm_head.weight"].square().sum(0)
    for index in range(LAYERS):
        for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
            whole += state[f"model.layers.{index}.{name}.weight"].square().sum(0)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            whole += state[f"model.layers.{index}.{name}.weight"].square().sum(1)
    torch.testing.assert_close(found.hidden_of(range(LAYERS)), whole.sqrt().float())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "olmo2", "phi3", "qwen3"])
def test_taylor_is_the_root_of_the_squares_of_weight_times_gradient_of_each_window(kind: str) -> None:
    axes: tuple[Axis, ...] = AXES if kind != "gpt2" else ("ffn", "heads", "hidden")
    model = tiny(kind, dtype=torch.float32)
    found = scored(model, TEXT, axes, score="taylor")
    squares = squared_products(model, [[window] for window in ids()])
    check_taylor(model, axes, found, squares)


def test_the_documents_of_a_packed_window_are_one_sample_of_taylor() -> None:
    model = tiny("llama", dtype=torch.float32)
    packed = {"input_ids": ids().reshape(1, -1), "position_ids": torch.arange(12).repeat(2)[None]}
    check_taylor(model, AXES, scored(model, [packed], AXES, score="taylor"), squared_products(model, [list(ids())]))


def squared_products(model: Any, windows: list[list[Tensor]]) -> dict[str, Tensor]:
    """Name -> sum over windows of (weight x gradient of the summed loss of the window's documents)^2, in fp64 with transformers' loss."""
    exact = copy.deepcopy(model).double()
    squares = {name: torch.zeros_like(parameter) for name, parameter in exact.named_parameters()}
    for documents in windows:
        exact.zero_grad()
        for document in documents:
            # transformers' loss is the mean over the predicted tokens
            (exact(input_ids=document[None], labels=document[None]).loss * (len(document) - 1)).backward()
        for name, parameter in exact.named_parameters():
            squares[name] += (parameter.detach() * parameter.grad).square()
    return squares


def check_taylor(model: Any, axes: tuple[Axis, ...], found: Scores, squares: dict[str, Tensor]) -> None:
    for axis in axes:
        scores = found.hidden_of(range(LAYERS)) if axis == "hidden" else found.axes[axis][1]
        for index in (0, len(scores) - 1):
            wanted = sum(float(squares[name][gone].sum()) for name, gone in cut_away(model, axis, index).items())
            assert float(scores[index]) == pytest.approx(wanted**0.5, rel=1e-4), (axis, index)


def cut_away(model: Any, axis: Axis, index: int) -> dict[str, Tensor]:
    """Name -> where the cut of one index (in layer 1) removes something, found by cutting tensors of positions."""
    family = family_of(model)
    sizes = sizes_of(model.config, family)
    left = [other for other in range(sizes.of(axis)) if other != index]
    stay: dict[str, Any] = {axis: left if axis == "hidden" else [left] * LAYERS}
    if axis == "kv_heads":
        stay["heads"] = [[head for head in range(HEADS) if head // GROUP != index]] * LAYERS
    kept = Kept(layers=list(range(LAYERS)), **stay)
    found = {}
    for name, parameter in model.named_parameters():
        layer, _ = family.place(name)
        if axis != "hidden" and layer != 1:
            continue
        places = torch.arange(parameter.numel()).view(parameter.shape)
        stays = sliced(places, family, name, kept, layer, sizes)
        found[name] = ~torch.isin(places, stays)
    return found


@pytest.mark.parametrize("score", SCORES)
def test_scores_depend_neither_on_batching_nor_on_padding(score: ChannelScore) -> None:
    model = tiny("qwen3", dtype=torch.float32).train()
    padded = torch.cat([ids(), torch.full((2, 3), 5)], 1)
    mask = torch.cat([torch.ones_like(ids()), torch.zeros(2, 3, dtype=torch.int64)], 1)
    whole = scored(model, TEXT, AXES, score=score, influence=True)
    parts = [{"input_ids": padded[:1], "attention_mask": mask[:1]}, {"input_ids": ids()[1:]}]
    split = scored(model, iter(parts), AXES, score=score, influence=True)
    for axis in AXES:
        pairs = zip(whole.hidden, split.hidden, strict=True) if axis == "hidden" else zip(whole.axes[axis], split.axes[axis], strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=2e-4, atol=1e-6)
    assert whole.influence is not None
    assert split.influence is not None
    torch.testing.assert_close(whole.influence, split.influence, rtol=1e-4, atol=1e-6)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_documents_of_a_packed_window_score_as_they_do_alone() -> None:
    score: ChannelScore = "weight_activation"
    model = tiny("llama", dtype=torch.float32)
    packed = {"input_ids": ids().reshape(1, -1), "position_ids": torch.arange(12).repeat(2)[None]}
    alone, together = scored(model, TEXT, AXES, score=score), scored(model, [packed], AXES, score=score)
    for one, other in zip(alone.axes["heads"], together.axes["heads"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(alone.hidden_of(range(LAYERS)), together.hidden_of(range(LAYERS)), rtol=1e-3, atol=1e-5)


def test_influence_is_one_minus_the_cosine_of_a_layers_input_and_output() -> None:
    model = tiny("mistral", dtype=torch.float32)
    found = scored(model, TEXT, [], influence=True).influence
    with torch.no_grad():
        states = model(input_ids=ids(), output_hidden_states=True).hidden_states
    expected = [1 - torch.nn.functional.cosine_similarity(states[index], states[index + 1], dim=-1).mean() for index in range(LAYERS - 1)]
    assert found is not None
    torch.testing.assert_close(found[:-1], torch.stack(expected))
    assert scored(model, [], ["ffn"], score="magnitude").influence is None


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_family_is_scored_and_cut_by_every_score(kind: str) -> None:
    own = kind in ("gpt2", "opt")
    model = tiny(kind, dtype=torch.float32)
    before = Sizes(ffn=FFN, heads=HEADS, kv_heads=HEADS if own else KEYS, hidden=HIDDEN, layers=LAYERS, head_dim=WIDTH)
    after = Sizes(ffn=9, heads=3 if own else 2, kv_heads=3 if own else 2, hidden=12, layers=LAYERS, head_dim=WIDTH)
    for score in SCORES:
        kept = kept_by(scored(model, TEXT, AXES, score=score), list(range(LAYERS)), before, after)
        assert torch.isfinite(logits(cut(model, kept))).all()


def test_pruning_by_score_loses_less_than_pruning_the_best() -> None:
    model = tiny("llama", dtype=torch.float32)
    before = Sizes(ffn=FFN, heads=HEADS, kv_heads=KEYS, hidden=HIDDEN, layers=LAYERS, head_dim=WIDTH)
    found = scored(model, TEXT, ["ffn"])
    after = Sizes(**{**before.record(), "ffn": 13})
    good = cut(model, kept_by(found, [0, 1, 2, 3], before, after))
    worst = type(found)(axes={"ffn": [-part for part in found.axes["ffn"]]})
    bad = cut(model, kept_by(worst, [0, 1, 2, 3], before, after))
    near, far = ((logits(other) - logits(model)).norm() for other in (good, bad))
    assert near < 0.7 * far


@pytest.mark.parametrize("score", ["weight_activation", "activation", "taylor"])
def test_text_without_a_token_is_refused(score: ChannelScore) -> None:
    model = tiny("llama", dtype=torch.float32)
    for batches in ([], [{"input_ids": ids(), "attention_mask": torch.zeros_like(ids())}]):
        with pytest.raises(UserError, match=r"the calibration text has no token; raise prune\.calibration_tokens"):
            scored(model, batches, ["ffn"], score=score)


@pytest.mark.parametrize("score", SCORES)
def test_broken_weights_are_refused_with_their_layer(score: ChannelScore) -> None:
    model = tiny("llama", dtype=torch.float32)
    torch.nn.init.constant_(model.get_submodule("model.layers.2.mlp.down_proj").weight, float("nan"))
    with pytest.raises(NonFiniteError, match=r"scores of FFN channels are not finite \(layer [0-3]\): the model's weights"):
        scored(model, TEXT, ["ffn"], score=score)
    with pytest.raises(NonFiniteError, match=r"scores of (hidden channels|layers) are not finite"):
        scored(model, TEXT, ["hidden"], score=score, influence=True)
