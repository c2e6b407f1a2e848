"""Repairs without training: the refit is least squares, factors are the best that were tried, and only what helps is kept."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decoct.models.common.errors import NonFiniteError, UserError
from decoct.models.family_map import family_of
from decoct.models.pruning.grams import Grams
from decoct.models.pruning.kept import Kept
from decoct.models.pruning.norm_outputs import NormOutputs, hidden_norms, nearest
from decoct.models.pruning.parent_outputs import ParentOutputs
from decoct.models.pruning.repair import cut_and_repair, refit
from decoct.models.pruning.structured import cut
from decoct.models.sizes import sizes_of

from ...support.pruned_families import FFN, HIDDEN, LAYERS, VOCABULARY, ids, logits, tiny

ALL = list(range(LAYERS))
NARROW = [0, 1, 3, 4, 5, 8, 9, 12, 14, 17, 20, 23]


def text(seed: int, rows: int = 8) -> list[dict[str, Tensor]]:
    made = torch.randint(1, VOCABULARY, (rows, 16), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part} for part in made.split(3)]


FIT, HELD_OUT = text(1), text(2)


def test_the_refit_is_the_least_squares_of_the_outputs() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 7, generator=draw, dtype=torch.float64) @ torch.randn(7, 7, generator=draw, dtype=torch.float64)
    matrix = torch.randn(5, 7, generator=draw, dtype=torch.float64)
    columns = torch.tensor([0, 2, 3, 6])
    found = refit(matrix, inputs.T @ inputs, columns)
    exact = torch.linalg.lstsq(inputs[:, columns], inputs @ matrix.T).solution.T

    def error(weights: Tensor) -> float:
        return float((inputs @ matrix.T - inputs[:, columns] @ weights.T).square().sum())

    plain = error(matrix[:, columns])
    assert error(exact) < error(found) < 0.3 * plain + 0.7 * error(exact)
    # nothing is gone, so nothing changes
    torch.testing.assert_close(refit(matrix, inputs.T @ inputs, torch.arange(7)), matrix)


def test_inputs_that_are_always_zero_keep_their_weights() -> None:
    inputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs[:, 1] = 0
    matrix = torch.arange(8.0, dtype=torch.float64).view(2, 4)
    found = refit(matrix, inputs.T @ inputs, torch.tensor([0, 1]))
    assert torch.equal(found[:, 1], matrix[:, 1])
    assert torch.isfinite(refit(matrix, torch.zeros(4, 4, dtype=torch.float64), torch.tensor([0, 1]))).all()


def test_grams_are_sums_over_unmasked_tokens_in_any_number_of_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("opt")
    mask = torch.ones_like(ids())
    mask[1, 7:] = 0
    names = [f"model.decoder.layers.{layer}.fc2" for layer in (0, 2, 3)]
    seen: list[Tensor] = []
    handle = model.get_submodule(names[1]).register_forward_pre_hook(lambda _m, given: seen.append(given[0].detach()))
    with torch.no_grad():
        model(input_ids=ids(), attention_mask=mask)
    handle.remove()
    rows = seen[0].reshape(2, 12, FFN)[mask.bool()]
    batch = [{"input_ids": ids(), "attention_mask": mask}]
    once = dict(Grams(model, batch, names))
    torch.testing.assert_close(once[names[1]], rows.T @ rows)
    monkeypatch.setattr("decoct.models.pruning.grams.BUDGET", 1)
    several = dict(Grams(model, batch, names))
    assert list(several) == names
    assert all(torch.equal(once[name], several[name]) for name in names)


def test_the_divergence_is_that_of_the_logits_and_outlives_the_parent() -> None:
    for kind in ("gemma2", "gpt2"):
        parent, other = tiny(kind, dtype=torch.float32), tiny(kind, dtype=torch.float32, seed=3)
        judge = ParentOutputs(parent, [{"input_ids": ids()}])
        assert judge.kl(parent) == pytest.approx(0, abs=1e-6)
        theirs, own = (logits(model)[:, :-1].double().log_softmax(-1) for model in (parent, other))
        expected = float((theirs.exp() * (theirs - own)).sum(-1).mean())
        assert judge.kl(other) == pytest.approx(expected, rel=1e-4)
        for parameter in parent.parameters():
            parameter.data = parameter.data.new_empty(0)
        assert judge.kl(other) == pytest.approx(expected, rel=1e-4)


def test_energy_ratios_compare_the_channels_that_stay_with_all() -> None:
    model = tiny("llama")
    with torch.no_grad():
        states = model(input_ids=ids(), output_hidden_states=True).hidden_states
    kept = Kept(layers=[0, 2, 3], hidden=NARROW)
    family = family_of(model)
    before = sizes_of(model.config, family)
    names = hidden_norms(family, kept)
    norms = {f"model.layers.{layer}.{norm}_layernorm" for layer in range(3) for norm in ("input", "post_attention")}
    assert set(names.values()) == norms | {"model.norm"}
    assert names["model.layers.2.input_layernorm"] == "model.layers.1.input_layernorm"
    found = NormOutputs(model, [{"input_ids": ids()}], list(names), NARROW)
    read = states[2].double()
    expected = float((read[..., NARROW].square().mean() / read.square().mean()).sqrt())
    assert found.ratio("model.layers.2.input_layernorm", kept, before, kept.sizes(before)) == pytest.approx(expected, rel=1e-9)
    with torch.no_grad():
        given = model.model.layers[2].input_layernorm(states[2])[..., NARROW].reshape(-1, len(NARROW))
    torch.testing.assert_close(found.outputs("model.layers.2.input_layernorm"), given)


def test_the_factor_with_the_least_squares_is_the_nearest() -> None:
    own = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=torch.float64)
    assert nearest((1.0, 0.5, 0.9), own, 0.85 * own) == 2
    assert nearest((1.0, 0.5, 0.9), own, 0.6 * own) == 1
    assert nearest((1.0, 1.0), own, own) == 0


CUTS = {
    "hidden": Kept(layers=ALL, hidden=NARROW),
    "ffn": Kept(layers=ALL, ffn=[list(range(0, FFN, 2))] * LAYERS),
    "heads": Kept(layers=ALL, heads=[[0, 1, 3, 4]] * LAYERS),
}


@pytest.mark.parametrize(
    ("cut_name", "kind"), [("hidden", "llama"), ("hidden", "gemma3_text"), ("ffn", "qwen3"), ("heads", "phi3"), ("ffn", "gpt2")]
)
def test_a_repair_that_is_kept_lowers_the_divergence_on_held_out_text(cut_name: str, kind: str) -> None:
    told: list[str] = []
    parent, again = (tiny(kind, dtype=torch.float32) for _ in range(2))
    judge = ParentOutputs(again, HELD_OUT)
    plain = judge.kl(cut(again, CUTS[cut_name]))
    student, repairs = cut_and_repair(parent, CUTS[cut_name], FIT, HELD_OUT, tell=told.append)
    assert [repair.name for repair in repairs] == [{"hidden": "norms", "heads": "attention"}.get(cut_name, cut_name)]
    assert repairs[0].before == pytest.approx(plain, rel=1e-5)
    assert repairs[0].kept == (repairs[0].after < repairs[0].before)
    assert judge.kl(student) == pytest.approx(min(repairs[0].before, repairs[0].after), rel=1e-5)
    assert repairs[0].kept, "of these models every repair helps"
    assert f"KL {plain:.4f} -> {repairs[0].after:.4f} on held-out windows, kept" in told[0]
    assert f"{plain:.4f} as cut, {repairs[0].after:.4f} after repairs" in told[-1]


def test_a_repair_that_does_not_help_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoct.models.pruning.repair.refit", lambda matrix, _gram, columns: -9 * matrix[:, columns])
    parent, again = (tiny("llama", dtype=torch.float32) for _ in range(2))
    student, (repair,) = cut_and_repair(parent, CUTS["ffn"], FIT, HELD_OUT)
    assert not repair.kept
    assert repair.record() == {"repair": "ffn", "kl_before": repair.before, "kl_after": repair.after, "kept": False}
    pairs = zip(student.named_parameters(), cut(again, CUTS["ffn"]).named_parameters(), strict=True)
    assert all(one == two and torch.equal(a, b) for (one, a), (two, b) in pairs)


def test_factors_are_no_worse_than_one_kind_for_all_norms() -> None:
    # the whole text judges, so that the choice can be checked against every uniform one
    parent, again = (tiny("mistral", dtype=torch.float32) for _ in range(2))
    judge = ParentOutputs(again, FIT)
    student, (repair,) = cut_and_repair(parent, CUTS["hidden"], FIT, FIT)
    assert repair.after <= repair.before
    plain: Any = cut(again, CUTS["hidden"])
    for norm in [
        *itertools.chain(*((layer.input_layernorm, layer.post_attention_layernorm) for layer in plain.model.layers)),
        plain.model.norm,
    ]:
        norm.weight.data.mul_((len(NARROW) / HIDDEN) ** 0.5)
    assert repair.after <= judge.kl(plain) + 1e-6
    assert judge.kl(student) == pytest.approx(min(repair.before, repair.after), rel=1e-5)


def test_matrices_whose_zeros_are_a_mask_are_left_alone() -> None:
    parent, again = (tiny("llama", dtype=torch.float32) for _ in range(2))
    left = ["model.layers.0.mlp.down_proj", "model.layers.3.mlp.down_proj"]
    student, _ = cut_and_repair(parent, CUTS["ffn"], FIT, HELD_OUT, leave=left)
    plain = cut(again, CUTS["ffn"])
    assert all(torch.equal(student.get_parameter(f"{name}.weight"), plain.get_parameter(f"{name}.weight")) for name in left)
    changed = "model.layers.2.mlp.down_proj.weight"
    assert not torch.equal(student.get_parameter(changed), plain.get_parameter(changed))
    every = [f"model.layers.{layer}.mlp.down_proj" for layer in ALL]
    _, none = cut_and_repair(tiny("llama", dtype=torch.float32), CUTS["ffn"], FIT, HELD_OUT, leave=every)
    assert none == []


def test_text_and_weights_that_say_nothing_are_refused() -> None:
    model = tiny("llama", dtype=torch.float32)
    with pytest.raises(UserError, match="no two tokens in a row to compare models on"):
        ParentOutputs(model, [{"input_ids": ids()[:, :1]}])
    judge = ParentOutputs(model, HELD_OUT)
    nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(NonFiniteError, match="the KL divergence of the cut model is not finite"):
        judge.kl(model)
