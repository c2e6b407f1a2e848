"""The scales of AWQ and SmoothQuant, and clipping, beside slow and obvious forms of them."""

from typing import Any

import pytest
import torch

from decoct.models.couplings import couplings
from decoct.models.families import decoder_layers
from decoct.models.family_map import FAMILIES
from decoct.qat.fake_quant import fake_quant
from decoct.qat.spec import QuantSpec
from decoct.qat.transforms.clipping import SHARES, clip, is_clipped
from decoct.qat.transforms.folding import by_channel, channels, fold_scales, per_reader
from decoct.qat.transforms.scales import smoothing
from decoct.qat.transforms.settings import TransformSettings

from ...support.pruned_families import tiny
from .test_exact import SPEC, text, transformed


def inputs_of(model: Any, name: str) -> torch.Tensor:
    """[tokens, in] of a linear on the calibration text, without padding."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, given: seen.append(given[0].detach()))
    with torch.no_grad():
        for batch in text().batches:
            model(**batch)
    handle.remove()
    return torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, text().batches)])


def test_scales_are_those_of_the_formula() -> None:
    inputs, weights = torch.tensor([1.0, 4.0, 16.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 4.0, 1.0, 0.0])
    found = smoothing(inputs, weights, 0.5)
    # 1, 2 and 2 over their geometric mean; channels without inputs or weights stay
    assert found.tolist() == pytest.approx([4 ** (-1 / 3), 2 * 4 ** (-1 / 3), 2 * 4 ** (-1 / 3), 1.0, 1.0])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_planted_factor_is_given_back_whatever_alpha_is(alpha: float) -> None:
    drawn = torch.Generator().manual_seed(0)
    inputs, weights = torch.rand(40, generator=drawn) + 0.1, torch.rand(40, generator=drawn) + 0.1
    factor = torch.ones(40)
    factor[::9] = 32.0
    ratio = smoothing(inputs * factor, weights / factor, alpha) / smoothing(inputs, weights, alpha)
    torch.testing.assert_close(ratio / ratio[1], factor.double(), rtol=1e-6, atol=0)


def test_heads_of_values_are_read_by_their_group() -> None:
    one = couplings(tiny("llama").config)[1]
    scales = torch.arange(8.0)
    assert per_reader(scales, one).tolist() == [0, 1, 2, 3] * 3 + [4, 5, 6, 7] * 3
    assert torch.equal(by_channel(per_reader(scales, one), one), scales[:, None].expand(-1, 3))


@torch.no_grad()
def test_smoothquant_is_the_formula_on_the_text() -> None:
    before, after = tiny("llama", dtype=torch.float32), tiny("llama", dtype=torch.float32)
    transformed(after, TransformSettings(method="smoothquant", alpha=0.7))
    layer = "model.layers.0."
    x = inputs_of(before, f"{layer}mlp.down_proj").abs().amax(0)
    w = before.get_submodule(f"{layer}mlp.down_proj").weight.abs().amax(0)
    scales = (x**0.7 / w**0.3).double()
    scales /= scales.log().mean().exp()
    ratio = after.get_submodule(f"{layer}mlp.down_proj").weight / before.get_submodule(f"{layer}mlp.down_proj").weight
    torch.testing.assert_close(ratio[0].double(), scales, rtol=1e-4, atol=0)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)


@torch.no_grad()
def test_awq_lowers_the_error_of_the_outputs_on_the_text() -> None:
    before, after = tiny("qwen2", dtype=torch.float32), tiny("qwen2", dtype=torch.float32)
    # an outlier that is no accident
    family = FAMILIES["qwen2"]
    for model in (before, after):
        for layer in decoder_layers(model):
            for one in couplings(model.config):
                scales = torch.ones(channels(family, one, layer), dtype=torch.float64)
                scales[1] = 1 / 16
                fold_scales(layer, family, one, scales)
    record = transformed(after, TransformSettings(method="awq")).record()["scaled"]

    def error(model: Any, name: str) -> float:
        x, weight = inputs_of(model, name), model.get_submodule(name).weight
        return float(((fake_quant(weight, SPEC) - weight) @ x.T).square().sum())

    for leaf, producer in (
        ("self_attn.q_proj", "input_layernorm"), ("self_attn.o_proj", "self_attn.v_proj"), ("mlp.down_proj", "mlp.up_proj"),
    ):  # fmt: skip
        name = f"model.layers.1.{leaf}"
        assert error(after, name) < 0.9 * error(before, name), leaf
        assert record[producer]["error"] < 0.9


@pytest.mark.parametrize("spec", [SPEC, QuantSpec(bits=3, group_size=8, symmetric=False), QuantSpec(bits=4, group_size=8)])
def test_clipping_is_the_best_share_of_each_group(spec: QuantSpec) -> None:
    drawn = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, 24, generator=drawn) ** 3, torch.randn(60, 24, generator=drawn)
    moments = 2 / len(x) * x.T @ x
    found, width = clip(weight, spec, moments, None), spec.group_width(24)
    for row in range(5):
        for at in range(0, 24, width):
            group, part = weight[row, at : at + width], x[:, at : at + width]
            # a group alone, of which the outputs are known
            low, high = (-group.abs().max(), group.abs().max()) if spec.symmetric else (group.min(), group.max())
            tried = [group.clamp(low * share, high * share) for share in SHARES]
            alone = QuantSpec(bits=spec.bits, group_size="channel", symmetric=spec.symmetric)
            errors = [float(((fake_quant(cut[None], alone)[0] - group) @ part.T).square().sum()) for cut in tried]
            torch.testing.assert_close(found[row, at : at + width], tried[errors.index(min(errors))])
    assert not torch.equal(found, weight)


def test_queries_and_keys_are_not_clipped() -> None:
    clipped = {name for name in FAMILIES["llama"].matrices if is_clipped(FAMILIES["llama"], name)}
    assert clipped == {"self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert not is_clipped(FAMILIES["phi3"], "self_attn.qkv_proj") and is_clipped(FAMILIES["opt"], "self_attn.v_proj")
