"""What each module costs the model's output at each width: the estimates against the exact KL, and that against the whole model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from decoct.losses.divergences import forward_kl
from decoct.models.families import decoder_linears
from decoct.qat.bit_assignment import groups_of
from decoct.qat.fake_quant import decode, encode
from decoct.qat.ptq import CalibrationText, sensitivity
from decoct.qat.ptq.sensitivity import Losses, Sensitivity
from decoct.qat.spec import QuantSpec

RandomModel = Callable[..., PreTrainedModel]
SPECS = [QuantSpec(bits=bits, group_size=16) for bits in (3, 6)]


def text(lengths: tuple[int, ...] = (24, 24, 24, 24), padded: int = 24) -> CalibrationText:
    ids = torch.randint(0, 258, (len(lengths), padded), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(padded)[None] < torch.tensor(lengths)[:, None]
    batches = [{"input_ids": ids[at : at + 2], "attention_mask": mask[at : at + 2].long()} for at in range(0, len(ids), 2)]
    return CalibrationText(batches=batches)


def measured(model: PreTrainedModel, given: CalibrationText, exact: bool = True) -> tuple[list[tuple[str, ...]], Losses]:
    groups = groups_of(decoder_linears(model))
    candidates = {name: [*SPECS, None] for group in groups for name in group}
    made = Sensitivity(model, groups, candidates, given, method="rtn", vocabulary=258, seed=0)
    return groups, made.measure(forward_kl if exact else None)


def whole_model(model: PreTrainedModel, group: tuple[str, ...], spec: QuantSpec, given: CalibrationText) -> float:
    """The KL of the whole model with the modules of a group rounded."""
    before = logits(model, given)
    kept = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in group}
    for name, weight in kept.items():
        model.get_parameter(f"{name}.weight").data.copy_(decode(encode(weight, spec), spec))
    after = logits(model, given)
    for name, weight in kept.items():
        model.get_parameter(f"{name}.weight").data.copy_(weight)
    return float(forward_kl(after, before).sum()) / given.tokens


def logits(model: PreTrainedModel, given: CalibrationText) -> Tensor:
    with torch.no_grad():
        found = [model(**batch).logits[batch["attention_mask"].bool()] for batch in given.batches]
    return torch.cat(found)


# gemma2 caps its logits, qwen2 has biases
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_estimates_are_near_the_kl_of_the_whole_model(random_model: RandomModel, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(sensitivity, "DRAWS", 64)
    model, given = random_model(family), text()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.train()
    groups, losses = measured(model, given)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    model.eval()
    assert [len(group) for group in groups] == [3, 1, 2, 1] * 2
    for place, group in enumerate(groups):
        for at, spec in enumerate(SPECS):
            assert losses.exact[place][at] == pytest.approx(whole_model(model, group, spec, given), rel=1e-3, abs=1e-8)
        # what is left alone loses nothing
        assert losses.cheap[place][2] == losses.second_order[place][2] == losses.exact[place][2] == 0
    exact, cheap, second = (torch.tensor(found)[:, 1] for found in (losses.exact, losses.cheap, losses.second_order))
    # at 6 bits the quadratic form is the KL; 64 draws of 4 windows leave a tenth of noise
    assert bool((second / exact - 1).abs().max() < 0.4) and abs(float((second / exact).mean()) - 1) < 0.12
    assert bool(((cheap / exact) > 0.4).all() and ((cheap / exact) < 2.5).all())


def test_what_modules_cost_together_is_the_kl_of_the_whole_model(random_model: RandomModel) -> None:
    model, given = random_model("llama"), text((24, 24, 24, 17))
    groups = groups_of(decoder_linears(model))
    names = [name for group in groups for name in group]
    made = Sensitivity(model, groups, dict.fromkeys(names, SPECS), given, method="rtn", vocabulary=258, seed=0)
    made.measure()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    # the first group is left alone
    rounded = names[len(groups[0]) :]
    found = made.rounded_together({**dict.fromkeys(rounded, SPECS[0]), **dict.fromkeys(groups[0])}, forward_kl)
    assert found == pytest.approx(whole_model(model, tuple(rounded), SPECS[0], given), rel=1e-3)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_padding_changes_nothing(random_model: RandomModel) -> None:
    model = random_model("llama")
    _, short = measured(model, text((24, 24, 24, 24)), exact=False)
    ids = [torch.cat([batch["input_ids"], torch.zeros(2, 9, dtype=torch.int64)], 1) for batch in text().batches]
    mask = torch.cat([torch.ones(2, 24, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)], 1)
    padded = CalibrationText(batches=[{"input_ids": one, "attention_mask": mask} for one in ids])
    _, long = measured(model, padded, exact=False)
    for name in ("cheap", "second_order"):
        assert torch.allclose(torch.tensor(getattr(short, name)), torch.tensor(getattr(long, name)), rtol=1e-4, atol=0)
    assert short.exact == []


def test_methods_are_estimated_with_their_own_rounding(random_model: RandomModel) -> None:
    weight = random_model("llama").get_parameter("model.layers.1.mlp.up_proj.weight").detach()
    spec = QuantSpec(bits=2, group_size=16)
    errors = {
        method: float((sensitivity.rounded_values(weight, spec, method) - weight).square().sum()) for method in ("rtn", "mse", "gptq")
    }
    assert errors["mse"] <= errors["gptq"] < errors["rtn"]
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    assert not sensitivity.rounded_values(weight * kept, spec, "mse", kept)[~kept].any()
