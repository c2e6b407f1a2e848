"""The transformed model before rounding is the model that it was, in every family that can do it."""

from typing import Any

import pytest
import torch

from decoct.models.calibration.calibration_text import CalibrationText
from decoct.models.calibration.replay import Replay
from decoct.models.common.errors import UserError
from decoct.models.couplings import couplings
from decoct.models.families import decoder_layers, decoder_linears
from decoct.models.family_map import FAMILIES
from decoct.qat.ptq.walk import REMEDIES
from decoct.qat.spec import QuantSpec
from decoct.qat.transforms.folding import channels, fold_scales, stored_scales
from decoct.qat.transforms.settings import TransformSettings
from decoct.qat.transforms.table import open_transform

from ...support.pruned_families import CONFIGS, VOCABULARY, logits, tiny

SPEC = QuantSpec(bits=3, group_size="channel")
BOTH, HEADS = TransformSettings(method="rotation"), TransformSettings(method="rotation", residual=False)
ROTATED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3")
"""Families whose residual stream can be rotated."""
# gpt2 has no nn.Linear that could be rounded
LINEAR = [kind for kind in CONFIGS if kind != "gpt2"]


def text() -> CalibrationText:
    ids = torch.randint(1, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[::2, 11:] = 0
    return CalibrationText(batches=[{"input_ids": ids[at : at + 3], "attention_mask": mask[at : at + 3]} for at in (0, 3)])


@torch.no_grad()
def transformed(model: Any, settings: TransformSettings, seed: int = 0) -> Any:
    """The transform of every layer, without rounding."""
    layers = decoder_layers(model)
    transform = open_transform(model, settings, dict.fromkeys(decoder_linears(model), SPEC), seed=seed)
    transform.outside()
    replay = Replay(model, layers, text().batches, torch.device("cpu"), REMEDIES)
    for index, layer in enumerate(layers):
        transform.layer(index, layer, replay, lambda done: None)
        # kept hidden states are fp32, which the models of rotations are not
        if settings.calibrates:
            replay.finish(index, lambda done: None)
    return transform


def same(model: Any, before: torch.Tensor, tolerance: float) -> None:
    assert float((logits(model) - before).abs().max() / before.abs().max()) < tolerance


def changed(model: Any, kind: str) -> bool:
    """Whether any weight of a layer differs from that of the family's model."""
    other = tiny(kind, dtype=model.dtype).state_dict()
    return any(not torch.allclose(weight, other[name], rtol=1e-3) for name, weight in model.state_dict().items() if ".0." in name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_any_scales_of_every_coupling_change_nothing(kind: str) -> None:
    model, family = tiny(kind), FAMILIES[kind]
    before, drawn = logits(model), torch.Generator().manual_seed(0)
    for layer in decoder_layers(model):
        for one in couplings(model.config):
            fold_scales(layer, family, one, torch.rand(channels(family, one, layer), generator=drawn, dtype=torch.float64) * 4 + 0.2)
    assert changed(model, kind)
    same(model, before, 2e-6)


@pytest.mark.parametrize("settings", [TransformSettings(method="awq"), TransformSettings(method="smoothquant")], ids=["awq", "smoothquant"])
@pytest.mark.parametrize("kind", LINEAR)
def test_scales_found_on_text_change_nothing(kind: str, settings: TransformSettings) -> None:
    model = tiny(kind, dtype=torch.float32)
    before = logits(model)
    transform = transformed(model, settings)
    assert changed(model, kind)
    same(model, before, 2e-5)
    assert set(transform.record()["scaled"]) == {one.producer for one in couplings(model.config)}


@pytest.mark.parametrize("kind", CONFIGS)
def test_rotated_heads_change_nothing(kind: str) -> None:
    model = tiny(kind)
    before = logits(model)
    transformed(model, HEADS)
    assert changed(model, kind)
    same(model, before, 2e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ROTATED)
def test_a_rotated_residual_stream_changes_nothing(kind: str, tied: bool) -> None:
    model = tiny(kind, tie_word_embeddings=tied)
    before = logits(model)
    transform = transformed(model, BOTH, seed=5)
    same(model, before, 5e-6)
    assert transform.record()["untied"] is tied
    assert transform.record()["seed"] == 5
    assert model.config.tie_word_embeddings is False
    norms = [weight for name, weight in model.named_parameters() if name.endswith(("layernorm.weight", "model.norm.weight"))]
    assert len(norms) == 9 and all(bool((weight == 1).all()) for weight in norms)
    assert changed(model, kind)


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - set(ROTATED)))
def test_families_that_cannot_be_rotated_are_refused_by_name(kind: str) -> None:
    why = "LayerNorms, which subtract a mean" if kind in ("gpt2", "opt") else "stand between a block and the residual stream"
    with pytest.raises(UserError, match=f"model type '{kind}': the residual stream cannot be rotated: .*{why}.*residual: false"):
        open_transform(tiny(kind), BOTH, {})


def test_a_tensor_without_an_entry_is_refused() -> None:
    model = tiny("llama")
    model.model.layers[0].register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(UserError, match=r"transform awq: model type 'llama': its axis map does not have model\.layers\.\*\.extra"):
        open_transform(model, TransformSettings(method="awq"), {})


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_new_gain_of_a_norm_is_a_number_of_bf16(offset: float) -> None:
    drawn = torch.Generator().manual_seed(0)
    gain = torch.randn(500, generator=drawn, dtype=torch.float64) * 0.5 + 1
    gain[:3] = torch.tensor([0.0, 1e-5, -1.5], dtype=torch.float64)
    scales = torch.rand(500, generator=drawn, dtype=torch.float64) * 30 + 0.05
    found = stored_scales(scales, gain, offset)
    assert bool((found > 0).all()) and bool(found.isfinite().all()) and float(found[0]) == 1.0
    weight = gain / found - offset
    kept = found != 1
    torch.testing.assert_close(weight[kept], weight[kept].bfloat16().double(), rtol=1e-12, atol=1e-12)
    # near the scale that was asked for, as far as bf16 holds the weight: beside -1 it has a 256th at most
    assert float((found / scales).log().abs().median()) < (0.03 if offset else 4e-3)
