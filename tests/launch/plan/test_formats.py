"""What a format cannot hold is said by the plan, in the exporters' terms and with a setting that works."""

from typing import Any

import pytest
from transformers import LlamaConfig

from decoct.configs.loader import load_recipe
from decoct.launch.plan import plan, problems
from decoct.launch.plan.disk import EXPORT_BYTES
from decoct.launch.plan.formats import refusals
from decoct.launch.plan.targets import Case
from decoct.qat.export import EXPORTERS
from decoct.qat.spec import QuantSpec
from decoct.trainer.settings import ExportSettings


def said(
    form: Any, *, ffn: int = 512, heads: int = 4, skip: tuple[str, ...] = (), options: dict[str, Any] | None = None, **spec: Any
) -> str:
    config = LlamaConfig(hidden_size=32 * heads, intermediate_size=ffn, num_attention_heads=heads, num_hidden_layers=2)
    case = Case(config, QuantSpec(**spec), skip, 1)
    return "; ".join(refusals(case, ExportSettings(formats=(form,), **(options or {}))))


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "gptq_v2", "awq", "gguf", "safetensors"])
def test_one_symmetric_int4_lattice_goes_everywhere(form: str) -> None:
    assert said(form, bits=4, group_size=32) == ""
    assert form in EXPORTERS
    assert form in EXPORT_BYTES


def test_each_limit_is_named_with_the_nearest_setting() -> None:
    assert "use weights.bits=4, or name the version" in said("compressed-tensors", bits=3)
    assert said("compressed-tensors", bits=3, options={"reader_version": "0.18.0"}) == ""
    assert "add gptq_v2 to export.formats" in said("gptq", symmetric=False)
    assert said("gptq_v2", symmetric=False) == ""
    assert "use weights.bits=8" in said("gptq", bits=6)
    odd = said("gptq", ffn=500, group_size=4, bits=4)
    assert odd == (
        "gptq packs 8 codes in a word, and mlp.gate_proj has 500 outputs, no multiple; "
        "use prune.structured.ffn=496, or add '*.mlp.gate_proj' to skip"
    )
    assert said("gptq", ffn=500, group_size=4, skip=("*.gate_proj", "*.up_proj", "*.down_proj")) == ""
    assert "use weights.bits=4" in said("awq", bits=8)
    assert "mlp.gate_proj has 500, no multiple" in said("awq", ffn=500, group_size=4)
    assert "export.allow_inexact=true" in said("safetensors", bits=8)
    assert said("safetensors", bits=8, options={"allow_inexact": True}) == ""
    assert "asymmetric codes" in said("safetensors", symmetric=False)


def test_a_plan_with_such_a_format_has_a_problem_before_training() -> None:
    recipe = load_recipe("smollm2-1.7b-half-int4", ["stages.export.formats=[awq]", "stages.qat.weights.bits=8"])
    assert any("awq packs 4 bits, not 8; use weights.bits=4" in problem for problem in problems(plan(recipe, gpus=0)))
    recipe = load_recipe("smollm2-1.7b-half-int4", ["stages.export.formats=[awq,gptq,compressed-tensors]"])
    made = plan(recipe, gpus=0)
    assert not [problem for problem in problems(made) if "packs" in problem]
    sizes = next(stage.exports for stage in made.stages if stage.exports)
    assert sizes["gptq"] > sizes["compressed-tensors"] > 0
    assert {v.target: v.outcome for stage in made.stages for v in stage.verdicts}["vLLM"] == "ok"
