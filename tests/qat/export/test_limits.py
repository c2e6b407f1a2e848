"""Limits of formats from plain descriptions, without a model."""

from dataclasses import replace

import pytest

from decoct.qat.export.limits.formats import LIMITS, refusals
from decoct.qat.export.limits.refusal import Option, Refusal, said, sentence, weights
from decoct.qat.export.limits.stored_model import StoredModel, StoredModule
from decoct.qat.spec import QuantSpec

FOUR = QuantSpec(bits=4, group_size=32)


@pytest.mark.parametrize(
    ("spec", "holds"),
    [
        (FOUR, "compressed-tensors gptq gptq_v2 awq safetensors safetensors-f32"),
        (replace(FOUR, bits=3), "safetensors safetensors-f32"),
        (replace(FOUR, symmetric=False), "compressed-tensors gptq_v2 awq safetensors-f32"),
        (replace(FOUR, scale_grid="fp32"), "safetensors-f32"),
        (QuantSpec(kind="fp8_e4m3", bits=8, group_size="channel"), "compressed-tensors safetensors-f32"),
    ],
)
def test_a_scheme_alone_is_held_by_these_formats(spec: QuantSpec, holds: str) -> None:
    # GGUF asks for a family too
    formats = [name for name in LIMITS if not name.startswith("gguf")]
    assert [name for name in formats if not refusals(name, StoredModel.of_weights(spec))] == holds.split()


def test_one_reason_is_said_once_with_all_of_its_modules() -> None:
    names = [f"model.layers.{layer}.mlp.{part}_proj" for layer in range(3) for part in ("up", "down")]
    modules = tuple(StoredModule(name=name, spec=replace(FOUR, bits=8), rows=64, columns=64) for name in names)
    (found,) = refusals("awq", StoredModel(modules=modules, config=None))
    assert (found.format, found.reason, found.remedies) == ("awq", "packs 4 bits, not 8", (weights(bits=4),))
    assert [module.name for module in found.modules] == names
    assert [module.kind for module in found.modules[:2]] == ["mlp.up_proj", "mlp.down_proj"]


def test_all_modules_with_an_odd_side_are_left_out_together() -> None:
    sides = {"model.layers.0.a": (64, 64), "model.layers.0.b": (60, 64), "model.layers.1.c": (64, 60), "lm_head": (63, 64)}
    modules = tuple(StoredModule(name=name, spec=FOUR, rows=rows, columns=columns) for name, (rows, columns) in sides.items())
    (found,) = refusals("gptq", StoredModel(modules=modules, config=None))
    assert found.reason == "packs 8 codes in a word, and b has 60 outputs, no multiple"
    assert "Skip(patterns=('*.b', '*.c', 'lm_head'))" in map(str, found.remedies)


def test_a_verb_that_repeats_is_said_once() -> None:
    assert said([("use", "a=1"), ("use", "b=2"), ("leave", "c out"), ("use", "d=3")]) == "use a=1, or b=2, or leave c out, or use d=3"
    refusal = Refusal(reason="holds less", remedies=(weights(bits=4), Option("allow_inexact", "true")), format="some")
    only = sentence(refusal, lambda remedy, _: None if isinstance(remedy, Option) else ("use", "bits=4"), " (x)")
    assert only == "some holds less (x); use bits=4"
    assert sentence(refusal, lambda remedy, _: None) == "some holds less"
