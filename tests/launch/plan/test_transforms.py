"""What the plan says of a transform: what a family cannot do, by name and before any work, the head's bytes, and the work of a search."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from decoct.configs import recipe_from_dict
from decoct.launch.plan.make_plan import Plan, plan
from decoct.launch.plan.show import short_form
from decoct.launch.plan.stage_shapes import ImpossibleStageError
from decoct.models.folder.record import write_record

from ...support.pruned_families import CONFIGS

ROTATION = {"method": "rotation"}


def planned(folder: Path, transform: Any, *before: dict[str, Any], **settings: Any) -> Plan:
    data = {"builtin": "python-stdlib", "seq_length": 16, "packing": False}
    stage = {"quantize": {"weights": {"bits": 4, "group_size": "channel"}, "transform": transform, **settings}}
    given = {"name": "x", "student": {"path": str(folder)}, "data": data, "stages": [*before, stage]}
    return plan(recipe_from_dict(given), gpus=0)


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """``folder(kind, **changes)``: a folder with a config alone."""

    def make(kind: str, **changes: Any) -> Path:
        AutoConfig.for_model(kind, **{**CONFIGS[kind], "vocab_size": 48, "pad_token_id": 0, **changes}).save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "gpt2"])
def test_every_family_with_a_map_takes_scales(folder: Any, kind: str) -> None:
    made = planned(folder(kind), "awq")
    rounding = made.stages[0].rounding
    assert rounding is not None and rounding.tokens == 262_144
    notes = made.stages[0].notes
    if kind != "olmo2":
        assert notes == []
        return
    assert notes == [
        "transform awq: model type 'olmo2' has no norm or linear before self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, "
        "mlp.gate_proj, mlp.up_proj that could take their scales; self_attn.o_proj, mlp.down_proj are scaled, the others stay as they are"
    ]
    assert notes[0] in short_form(made)


@pytest.mark.parametrize(
    ("kind", "changes", "transform", "message"),
    [
        ("gemma2", {}, "rotation", "the gains of post_attention_layernorm, post_feedforward_layernorm stand between a block and"),
        ("olmo2", {}, "rotation", "the gains of post_attention_layernorm, post_feedforward_layernorm stand between a block and"),
        (
            "opt",
            {},
            "rotation",
            "LayerNorms, which subtract a mean that a rotation does not keep; use transform: {method: rotation, residual",
        ),
        (
            "llama",
            {"hidden_size": 184},
            "rotation",
            "no Hadamard matrix is known for the hidden size 184; the nearest sizes are 180 and 192",
        ),
        ("qwen3", {"head_dim": 92}, "rotation", "for the head size 92; the nearest sizes are 88 and 96; use heads: false"),
    ],
)
def test_what_a_model_cannot_do_is_refused_by_name(folder: Any, kind: str, changes: Any, transform: str, message: str) -> None:
    if changes.get("hidden_size"):
        changes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    with pytest.raises(ImpossibleStageError) as error:
        planned(folder(kind, **changes), transform)
    assert message in str(error.value)
    assert str(error.value).startswith("stages.0.quantize.transform: rotation: ")


@pytest.mark.parametrize("kind", ["gemma2", "olmo2", "opt"])
def test_the_remedy_works(folder: Any, kind: str) -> None:
    made = planned(folder(kind), {"method": "rotation", "residual": False})
    assert made.stages[0].notes == []


def test_a_family_without_a_map_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=48)
    config.save_pretrained(tmp_path / "falcon")
    with pytest.raises(ImpossibleStageError, match=r"awq: model type 'falcon': its axis map is missing, .*; leave 'transform' out"):
        planned(tmp_path / "falcon", "awq")


def test_a_mask_is_refused_before_a_rotation(folder: Any) -> None:
    place = folder("llama")
    prune = {"prune": {"magnitude": {"keep": 0.5}}}
    with pytest.raises(ImpossibleStageError, match=r"stages\.1\.quantize\.transform: rotation: .* pruned weights would not stay zero"):
        planned(place, "rotation", prune)
    planned(place, "smoothquant", prune)
    # as the record of a folder says it
    write_record(place, {"kind": "prune", "sparse": ["model.layers.0.mlp.up_proj"]})
    with pytest.raises(ImpossibleStageError, match="pruned weights would not stay zero"):
        planned(place, "rotation")


def test_an_untied_head_has_its_bytes(folder: Any) -> None:
    tied, without = planned(folder("mistral"), "rotation"), planned(folder("mistral"), {"method": "rotation", "residual": False})
    assert tied.stages[0].parameters - without.stages[0].parameters == 48 * 24
    assert tied.stages[0].notes == ["transform rotation: the output head is untied from the embedding, which adds 2,304 bytes in bf16"]
    assert without.stages[0].notes == []
    assert planned(folder("llama"), "rotation").stages[0].notes == []
    rounded = planned(folder("mistral"), "rotation", embedding={"bits": 8})
    (note,) = rounded.stages[0].notes
    assert note.endswith("which adds 2,304 bytes in bf16; it is not rounded, because 'embedding' no longer applies to it")


def test_the_line_of_a_stage_names_its_transform_and_a_rotation_counts_the_table(folder: Any) -> None:
    place = folder("llama", vocab_size=4000)
    rotated, heads, none = (planned(place, one) for one in ("rotation", {"method": "rotation", "residual": False}, None))
    assert "01-quantize: rotation + rtn, about " in short_form(rotated)
    assert "01-quantize: rtn, about " in short_form(none)
    both = (rotated.stages[0].rounding, heads.stages[0].rounding)
    assert both[0] is not None and both[1] is not None and both[0].transform == "rotation"
    # the table of the embedding, in fp32 and four times in fp64, instead of the largest linear, which is less than the plain work
    assert both[0].host_bytes - both[1].host_bytes > 30 * 4000 * 24


def test_a_search_takes_work_and_memory() -> None:
    data = {"builtin": "python-stdlib", "seq_length": 2048}
    stages = [
        {"quantize": {"name": f"s{index}", **one}} for index, one in enumerate([{}, {"transform": "smoothquant"}, {"transform": "awq"}])
    ]
    made = plan(recipe_from_dict({"name": "x", "student": {"path": "meta-llama/Llama-3.1-8B"}, "data": data, "stages": stages}), gpus=1)
    rtn, smooth, awq = (stage.rounding for stage in made.stages)
    assert rtn is not None and smooth is not None and awq is not None
    body, squares = 6_979_321_856, 3 * 4096**2 + 14336**2
    assert smooth.flop == 2 * 262_144 * body * (2 - 1 / 32)
    searched = 22 * 2 * 32 * ((6144 + 4096 + 28672) * 4096**2 + 4096 * 14336**2)
    assert awq.flop == pytest.approx(smooth.flop + 2 * 262_144 * 32 * squares + searched, rel=1e-9)
    assert awq.device_bytes > rtn.device_bytes + 4 * squares
    assert rtn.flop == 0


@pytest.mark.parametrize(
    ("transform", "settings", "message"),
    [
        ("awk", {}, "method: must be 'awq', 'smoothquant' or 'rotation'; got 'awk', did you mean 'awq'?"),
        ({"alpha": 0.5}, {}, "needs the key 'method'"),
        ({"method": "awq", "alpha": 0.5}, {}, "alpha=0.5 has no effect with method=awq: it belongs to smoothquant; leave it out"),
        ({"method": "smoothquant", "alpha": 2}, {}, "transform.alpha: 2 is out of range; it must be at least 0 and at most 1"),
        ({"method": "rotation", "residual": False, "heads": False}, {}, "leave nothing to rotate"),
        ({"method": "awq", "clip": True}, {"method": "gptq"}, "transform.clip cuts weights for method=rtn; method=gptq chooses its scales"),
        ("rotation", {"calibration_tokens": 100}, "calibration_tokens=100 has no effect with method=rtn"),
    ],
)
def test_wrong_settings_are_said(folder: Any, transform: Any, settings: Any, message: str) -> None:
    with pytest.raises(Exception, match="quantize") as error:
        planned(folder("llama"), transform, **settings)
    assert message in str(error.value)
