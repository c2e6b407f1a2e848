"""Pruning a whole model on calibration text: the order, what is summed, earlier zeros, and what is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from decoct.models.calibration.calibration_text import CalibrationText
from decoct.models.common.errors import NonFiniteError, UserError
from decoct.models.families import decoder_linears
from decoct.models.pruning import layerwise
from decoct.models.pruning.layerwise import CalibratedMethod, OneShot, amount_of_work, prune_layers
from decoct.models.pruning.pattern import Pattern
from decoct.models.pruning.selection import follows

TinyModel = Callable[..., Any]
WANDA, SPARSEGPT = OneShot(method="wanda", keep=0.5), OneShot(method="sparsegpt", keep=0.5)
STEPS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def windows(count: int = 12, length: int = 24) -> Tensor:
    return torch.randint(1, 128, (count, length), generator=torch.Generator().manual_seed(1))


def text_of(ids: Tensor, batch: int = 4, **more: Tensor) -> CalibrationText:
    parts = {"input_ids": ids, **more}
    return CalibrationText(batches=[{k: v[at : at + batch] for k, v in parts.items()} for at in range(0, len(ids), batch)])


def inputs_of(model: Any, names: list[str], ids: Tensor) -> dict[str, np.ndarray]:
    """The inputs [tokens, in] of linears in a pass of the whole model."""
    seen: dict[str, np.ndarray] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen.update({name: args[0].flatten(0, 1).double().numpy()})
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


def wanda_by_rows(weight: Tensor, x: np.ndarray, count: int) -> np.ndarray:
    scores = np.abs(weight.detach().double().numpy()) * np.linalg.norm(x, axis=0)
    mask = np.zeros(scores.shape, dtype=bool)
    for row, order in enumerate(np.argsort(-scores, axis=1, kind="stable")):
        mask[row, order[:count]] = True
    return mask


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_each_linear_sees_the_outputs_of_the_pruned_ones_before_it(tiny_model: TinyModel, kind: str) -> None:
    model, slow, dense = (tiny_model(kind, num_hidden_layers=2) for _ in range(3))
    pruned = prune_layers(model, WANDA, text_of(windows()))
    unlike = {}
    for layer in range(2):
        for step in STEPS:
            names = [name for name in decoder_linears(slow) if name.startswith(f"model.layers.{layer}.") and name.endswith(tuple(step))]
            # whole passes from the start again: of the model as it is pruned so far, and of the dense one
            given, undisturbed = inputs_of(slow, names, windows()), inputs_of(dense, names, windows())
            for name in names:
                weight = slow.get_submodule(name).weight
                mask = wanda_by_rows(weight, given[name], round(0.5 * weight.shape[1]))
                assert (mask == (model.get_submodule(name).weight != 0).numpy()).all(), name
                unlike[name] = (mask != wanda_by_rows(weight, undisturbed[name], round(0.5 * weight.shape[1]))).mean()
                weight.data.mul_(torch.from_numpy(mask))
                assert torch.equal(weight, model.get_submodule(name).weight), "what stays keeps its value"
    first = [value for name, value in unlike.items() if "layers.0.self_attn.q" in name]
    assert first == [0.0]
    # what the second layer keeps depends on the first one being pruned
    assert np.mean([value for name, value in unlike.items() if "layers.1." in name]) > 0.02
    assert pruned.kept == {name: int((linear.weight != 0).sum()) for name, linear in decoder_linears(model).items()}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_batching_and_padding_of_the_text_do_not_matter(tiny_model: TinyModel, method: CalibratedMethod) -> None:
    ids, how = windows(), OneShot(method=method, keep=0.4)
    padded = torch.cat([ids, torch.zeros(12, 5, dtype=torch.int64)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(12, 5, dtype=torch.int64)], 1)
    found = []
    for text in (text_of(ids), text_of(ids, 1), text_of(ids, 12), text_of(padded, 5, attention_mask=mask)):
        model = tiny_model("llama", num_hidden_layers=2)
        prune_layers(model, how, text)
        found.append(torch.cat([linear.weight.detach().flatten() for linear in decoder_linears(model).values()]))
    for other in found[1:]:
        differ = (found[0] != 0) != (other != 0)
        # sums are added in another order, which may turn a near tie
        assert differ.float().mean() < 2e-3
        assert (found[0] - other)[~differ].abs().mean() < 1e-3
    assert all(len(one) for one in found)


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_the_better_method_loses_less_and_is_reported_beside_magnitude(tiny_model: TinyModel, pattern: Pattern | None) -> None:
    ids = windows(64)
    with torch.no_grad():
        full = tiny_model("llama").model(input_ids=ids).last_hidden_state
    lost, relative = {}, {}
    for method in ("wanda", "sparsegpt"):
        model = tiny_model("llama")
        pruned = prune_layers(model, OneShot(method=method, keep=0.5, pattern=pattern), text_of(ids, 16))
        with torch.no_grad():
            lost[method] = float((model.model(input_ids=ids).last_hidden_state - full).square().mean())
        assert all(error.linears == 4 and 0 < error.error < error.energy for error in pruned.errors.values())
        assert list(pruned.errors) == [f"{part}.{name}" for part, name in KINDS]
        relative[method] = {kind: (error.relative, error.relative_baseline) for kind, error in pruned.errors.items()}
        assert pattern is None or all(follows(linear.weight, pattern) for linear in decoder_linears(model).values())
        assert not pruned.notes
    assert lost["sparsegpt"] < lost["wanda"]
    for kind, (error, by_magnitude) in relative["sparsegpt"].items():
        assert error < relative["wanda"][kind][0], kind
        assert error < by_magnitude, kind
    # random weights know nothing of their inputs: by rows or not, Wanda is ahead where inputs differ in size
    assert relative["wanda"]["mlp.down_proj"][0] < relative["wanda"]["mlp.down_proj"][1]


KINDS = [
    ("self_attn", "q_proj"), ("self_attn", "k_proj"), ("self_attn", "v_proj"), ("self_attn", "o_proj"),
    ("mlp", "gate_proj"), ("mlp", "up_proj"), ("mlp", "down_proj"),
]  # fmt: skip


@pytest.mark.parametrize("how", [WANDA, SPARSEGPT, OneShot(method="sparsegpt", keep=0.75, pattern=Pattern(3, 4))])
def test_zeros_of_the_record_stay_and_others_may_return(tiny_model: TinyModel, how: OneShot) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    linears = decoder_linears(model)
    before = {}
    for name, linear in linears.items():
        linear.weight.data[torch.rand(linear.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3] = 0
        before[name] = linear.weight == 0
    listed = [name for name in linears if not name.endswith("up_proj")]
    pruned = prune_layers(model, how, text_of(windows()), sparse=listed)
    for name, linear in linears.items():
        returned = bool(linear.weight[before[name]].any())
        # a zero that is no mask may make up for others; without a pattern, zeros are the first to go
        assert returned == (how.pattern is not None and name not in listed), name
    if how.pattern is None:
        assert pruned.kept == {name: linear.weight.numel() // 2 for name, linear in linears.items()}


def test_a_tensor_of_two_layers_is_pruned_once(tiny_model: TinyModel) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    up = [layer.mlp.up_proj for layer in model.model.layers]
    up[1].weight = up[0].weight
    pruned = prune_layers(model, WANDA, text_of(windows()))
    assert int((up[0].weight != 0).sum()) == up[0].weight.numel() // 2 and up[1].weight is up[0].weight
    assert "model.layers.1.mlp.up_proj" not in pruned.kept and pruned.errors["mlp.up_proj"].linears == 1


def test_the_work_that_is_told_adds_up(tiny_model: TinyModel) -> None:
    done, text = [], text_of(windows())
    model = tiny_model("llama").train()
    prune_layers(model, WANDA, text, advance=done.append)
    assert sum(done) == amount_of_work(model, text) == 7 * 12 * 24
    assert model.training


def test_a_raised_damping_is_told_and_no_factor_is_refused(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # fewer tokens than inputs and no damping: the Hessian has no factor
    short, how = text_of(windows(1, 6)), OneShot(method="sparsegpt", keep=0.5, damping=0.0)
    notes = prune_layers(tiny_model("llama", num_hidden_layers=1), how, short).notes
    assert any("damping raised to 0.001: their Hessian has no Cholesky factor with 0" in note for note in notes)
    monkeypatch.setattr(layerwise, "factorize", lambda *_args, **_more: None)
    with pytest.raises(UserError, match=r"sparsegpt: the Hessian of .*q_proj.* has no Cholesky factor with any damping up to 1; give more"):
        prune_layers(tiny_model("llama"), SPARSEGPT, short)


def zero_up(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data.zero_()


def nan_gate(model: Any) -> None:
    model.model.layers[2].mlp.gate_proj.weight.data[3, 4] = torch.nan


def huge_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm.weight.data.fill_(1e30)


@pytest.mark.parametrize("how", [WANDA, SPARSEGPT])
@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (zero_up, UserError, r"the inputs of model\.layers\.1\.mlp\.down_proj are all zero on the calibration text.*remove the layer"),
        (nan_gate, NonFiniteError, r"model\.layers\.2\.mlp\.gate_proj holds NaN or infinite weights"),
        (
            huge_norm,
            NonFiniteError,
            r"the inputs of model\.layers\.1\.self_attn\.q_proj are NaN, infinite or too large.*earlier checkpoint$",
        ),
    ],
)
def test_dead_layers_and_numbers_that_are_none_are_refused_by_name(
    tiny_model: TinyModel, how: OneShot, change: Callable[[Any], None], error: type[Exception], told: str
) -> None:
    model = tiny_model("llama")
    change(model)
    with pytest.raises(error, match=told):
        prune_layers(model, how, text_of(windows()))


def test_what_cannot_be_pruned_is_refused_before_a_weight_changes(tiny_model: TinyModel) -> None:
    model = tiny_model("llama", intermediate_size=46)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(
        UserError, match=r"pattern 2:4: model\.layers\.0\.mlp\.down_proj has 46 inputs, .*\(4 linears in all\); groups of 2"
    ):
        prune_layers(model, OneShot(method="wanda", keep=0.5, pattern=Pattern(2, 4)), text_of(windows()))
    with pytest.raises(UserError, match="wanda needs calibration text, and there is none; raise calibration_tokens"):
        prune_layers(model, WANDA, CalibrationText(batches=[]))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=128)
    with pytest.raises(UserError, match="prunes linears of the decoder layers, and this model has none there"):
        prune_layers(AutoModelForCausalLM.from_config(config), WANDA, text_of(windows()))


def test_a_linear_that_does_not_run_is_named_with_another_method(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    model.model.layers[0].spare = nn.Linear(32, 32)
    with pytest.raises(
        UserError, match=r"model\.layers\.0\.spare \(1 in all\) did not run .*; use prune\.magnitude, which needs no calibration"
    ):
        prune_layers(model, WANDA, text_of(windows()))
