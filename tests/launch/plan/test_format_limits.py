"""What a format cannot hold is said by the plan, in the exporters' terms and with a setting that works."""

from typing import Any

import pytest
from transformers import LlamaConfig

from decoct.configs.loader import load_recipe
from decoct.launch.plan.format_limits import format_problems, planned_model
from decoct.launch.plan.make_plan import plan
from decoct.launch.plan.problems import problems
from decoct.launch.plan.recipe_remedies import RecipeRemedies
from decoct.launch.plan.shapes import shape_of
from decoct.qat.export.export import EXPORTERS
from decoct.qat.scheme import QuantScheme, SpecChange
from decoct.qat.spec import ActivationSpec, QuantSpec


def said(
    form: Any,
    *,
    ffn: int = 512,
    heads: int = 4,
    skip: tuple[str, ...] = (),
    options: dict[str, Any] | None = None,
    other: dict[str, Any] | None = None,
    beside: dict[str, Any] | None = None,
    **spec: Any,
) -> str:
    config = LlamaConfig(hidden_size=32 * heads, intermediate_size=ffn, num_attention_heads=heads, num_hidden_layers=2)
    scheme = QuantScheme(weights=QuantSpec(**spec), skip=skip, **(other or {}))
    remedies = RecipeRemedies(shape_of(config, "a test"), scheme, (form,))
    return "; ".join(format_problems(planned_model(remedies, **(beside or {}), **(options or {})), remedies))


def test_a_remedy_leaves_out_every_format_that_is_refused() -> None:
    nf4 = [f"stages.qat.weights.{name}" for name in ("kind=nf4", "group_size=64")]
    both = load_recipe("smollm2-1.7b-half-int4", [*nf4, "stages.export.formats=[compressed-tensors,gguf]"])
    told = plan(both, gpus=0).stages[-2].refusals
    assert len(told) == 2
    assert all(line.endswith("or stages.export.formats=[safetensors-f32]") for line in told)
    # the remedy works
    assert not plan(load_recipe("smollm2-1.7b-half-int4", [*nf4, "stages.export.formats=[safetensors-f32]"]), gpus=0).stages[-2].refusals


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "gptq_v2", "awq", "gguf", "safetensors"])
def test_one_symmetric_int4_lattice_goes_everywhere(form: str) -> None:
    assert said(form, bits=4, group_size=32) == ""
    assert form in EXPORTERS


def test_each_limit_is_named_with_the_nearest_setting() -> None:
    assert "use weights.bits=4, or name the version" in said("compressed-tensors", bits=3)
    assert said("compressed-tensors", bits=3, options={"reader_version": "0.18.0"}) == ""
    assert "use export.formats=[gptq_v2], or weights.symmetric=true" in said("gptq", symmetric=False)
    assert said("gptq_v2", symmetric=False) == ""
    assert "use weights.bits=8" in said("gptq", bits=6)
    odd = said("gptq", ffn=500, group_size=4, bits=4)
    assert odd == (
        "gptq packs 8 codes in a word, and mlp.gate_proj has 500 outputs, no multiple; "
        "use prune.structured.ffn=496, or skip=[*.mlp.gate_proj,*.mlp.up_proj,*.mlp.down_proj], or export.formats=[compressed-tensors]"
    )
    assert said("gptq", ffn=500, group_size=4, skip=("*.gate_proj", "*.up_proj", "*.down_proj")) == ""
    assert "use weights.bits=4" in said("awq", bits=8)
    assert "mlp.gate_proj has 500, no multiple" in said("awq", ffn=500, group_size=4)
    assert "use export.formats=[safetensors-f32], or export.allow_inexact=true" in said("safetensors", bits=8)
    others: list[dict[str, Any]] = [{"bits": 8}, {"symmetric": False}, {"kind": "nf4"}]
    for spec in others:
        assert said("safetensors-f32", **spec) == ""
    assert "use export.formats=[gguf]" in said("gguf-q2_0", bits=4)
    assert said("gguf-q2_0", bits=2, group_size=64) == said("gguf-q2_0", bits=2, group_size="channel") == ""
    assert said("safetensors", bits=8, options={"allow_inexact": True}) == ""
    assert "asymmetric codes" in said("safetensors", symmetric=False)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "gptq_v2", "awq", "gguf"])
def test_kinds_and_ends_that_a_format_has_no_place_for_are_named(form: str) -> None:
    held, ways = "integer codes", "use "
    if form == "compressed-tensors":
        held, ways = "integer codes and the floats fp8_e4m3, mxfp4 and nvfp4", "use weights.kind=nvfp4 weights.group_size=16, or "
    elif form == "gguf":
        held = "integer codes and the floats mxfp4"
    assert said(form, kind="nf4") == f"{form} holds {held}, not kind=nf4; {ways}weights.kind=int, or export.formats=[safetensors-f32]"
    embedding = said(form, other={"embedding": SpecChange(bits=4, group_size=32)})
    reason = "has readers that expect an unquantized embedding"
    assert embedding == ("" if form == "gguf" else f"{form} {reason}; leave embedding out, or use export.formats=[gguf]")
    head = said(form, other={"head": SpecChange(group_size=32)}, group_size=32)
    assert ("export.formats=[compressed-tensors]" in head) == (form == "awq")


def test_what_the_exporters_would_refuse_after_training_is_said_before() -> None:
    assert "must be 0.18.0 or later" in said("compressed-tensors", bits=3, options={"reader_version": "0.17"})
    apart = {"overrides": {"*.q_proj": SpecChange(bits=8)}}
    assert said("compressed-tensors", other=apart) == (
        "compressed-tensors is read by servers that make one matrix of q_proj, k_proj, v_proj, and q_proj 8 bits in groups of 128 and "
        "k_proj 4 bits in groups of 128 differ; let overrides name all of q_proj, k_proj, v_proj alike, or none"
    )
    assert "awq has one group size, not 128 and 64" in said("awq", other={"overrides": {"*.down_proj": SpecChange(group_size=64)}})
    for form in ("compressed-tensors", "gptq", "awq", "gguf"):
        assert "use weights.scale_grid=bf16_fp16" in said(form, scale_grid="fp32")
    assert said("safetensors", kind="mxfp4", group_size=32) == ""


def test_parts_of_a_fused_matrix_may_have_scales_that_were_found_differently() -> None:
    for change in (SpecChange(divisor="qmax"), SpecChange(scale_grid="bf16")):
        for pattern in ("*.k_proj", "*.up_proj"):
            assert said("compressed-tensors", other={"overrides": {pattern: change}}) == ""
    assert said("compressed-tensors", group_size="channel", other={"overrides": {"*.k_proj": SpecChange(group_size="tensor")}}) == ""
    # what is stored must be one
    for stored, words in (
        (SpecChange(symmetric=False), "k_proj 4 bits in groups of 128, with zero points"),
        (SpecChange(group_size=64), "64"),
    ):
        found = said("compressed-tensors", other={"overrides": {"*.k_proj": stored}})
        assert "make one matrix of q_proj, k_proj, v_proj" in found
        assert words in found


def test_lattices_of_single_modules_are_looked_at_too() -> None:
    found = said("awq", other={"overrides": {"*.down_proj": SpecChange(bits=8)}})
    assert found == "awq packs 4 bits, not 8; use {bits: 4} in overrides for mlp.down_proj"


FP8 = ActivationSpec(kind="fp8_e4m3", scaling="static")


@pytest.mark.parametrize(
    "form", [form for form in EXPORTERS if not form.startswith("gguf-") and form not in ("compressed-tensors", "bitsandbytes")]
)
def test_only_one_format_says_what_is_rounded_beside_weights(form: str) -> None:
    for key, what, spec in (("kv_cache", "keys and values", FP8), ("activations", "inputs", ActivationSpec())):
        found = said(form, bits=4, group_size=32, beside={key: spec})
        reason = f"cannot record that {what} are rounded ({key}), so servers would compute another model"
        assert found == f"{form} {reason}; use export.formats=[compressed-tensors], or leave {key} out"


def test_what_compressed_tensors_says_of_it() -> None:
    form, w8 = "compressed-tensors", {"bits": 8, "group_size": "channel"}
    assert said(form, **w8, beside={"activations": ActivationSpec(scaling="static"), "kv_cache": FP8}) == ""
    assert said(form, bits=4, group_size=32, beside={"kv_cache": FP8}) == ""
    assert "use weights.bits=8 weights.group_size=channel, or leave activations out" in said(
        form, bits=4, beside={"activations": ActivationSpec()}
    )
    assert "use activations.kind=int8" in said(form, **w8, beside={"activations": FP8})
    for other in (ActivationSpec(), ActivationSpec(scaling="static"), ActivationSpec(kind="fp8_e4m3")):
        found = said(form, bits=4, group_size=32, beside={"kv_cache": other})
        assert found.endswith("use kv_cache.kind=fp8_e4m3 kv_cache.scaling=static, or leave kv_cache out"), found
        assert f"not {other.kind}, {other.scaling}: " in found


def test_a_plan_says_so_before_training() -> None:
    recipe = load_recipe("smollm2-1.7b-half-int4", ["stages.qat.kv_cache.kind=int8", "stages.export.formats=[compressed-tensors,gguf]"])
    found = [problem for problem in problems(plan(recipe, gpus=0)) if "keys and values" in problem]
    assert len(found) == 2 and "not int8, dynamic" in found[0] and "gguf cannot record" in found[1]
    good = ["stages.qat.kv_cache.kind=fp8_e4m3", "stages.qat.kv_cache.scaling=static", "stages.export.formats=[compressed-tensors]"]
    made = plan(load_recipe("smollm2-1.7b-half-int4", good), gpus=0)
    assert not [problem for problem in problems(made) if "kv_cache" in problem]
    assert "keys and values in fp8" in {v.target: v.reason for stage in made.stages for v in stage.verdicts}["vLLM"]
    inputs = ["stages.qat.activations.kind=int8", "stages.qat.weights.bits=8", "stages.qat.weights.group_size=channel"]
    made = plan(load_recipe("smollm2-1.7b-half-int4", [*inputs, "stages.export.formats=[compressed-tensors]"]), gpus=0)
    assert {v.target: v.reason for stage in made.stages for v in stage.verdicts}["vLLM"] == "int8 kernels, W8A8"


def test_a_plan_with_such_a_format_has_a_problem_before_training() -> None:
    recipe = load_recipe("smollm2-1.7b-half-int4", ["stages.export.formats=[awq]", "stages.qat.weights.bits=8"])
    assert any("awq packs 4 bits, not 8; use stages.qat.weights.bits=4" in problem for problem in problems(plan(recipe, gpus=0)))
    recipe = load_recipe("smollm2-1.7b-half-int4", ["stages.export.formats=[awq,gptq,compressed-tensors]"])
    made = plan(recipe, gpus=0)
    assert not [problem for problem in problems(made) if "packs" in problem]
    sizes = next(stage.exports for stage in made.stages if stage.exports)
    assert sizes["gptq"] > sizes["compressed-tensors"] > 0
    assert {v.format: v.outcome for stage in made.stages for v in stage.verdicts if v.target == "vLLM"} == dict.fromkeys(sizes, "ok")
