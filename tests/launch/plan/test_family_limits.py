"""What a family cannot do is said by the plan, with its name and the remedy; what it can do has a plan."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoConfig

from decoct.configs import recipe_from_dict
from decoct.launch.plan.before_run import check_before_run
from decoct.launch.plan.make_plan import Plan, plan
from decoct.launch.plan.problems import problems
from decoct.launch.plan.shapes import shape_of
from decoct.launch.plan.show import short_form
from decoct.launch.plan.stage_shapes import ImpossibleStageError
from decoct.models.common.errors import UserError
from decoct.models.pruning.kept import Kept
from decoct.models.pruning.structured import cut

from ...support.pruned_families import LAYER_NORM, tiny

QUANTIZE = {"quantize": {"weights": {"bits": 4, "group_size": 16}}}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_OPT = {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_MIXTRAL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES = {
    "gpt2": _GPT2,
    "opt": _OPT,
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
}
"""Families whose configs lack what the plan once asked for."""


def recipe(tmp_path: Path, kind: str, stage: dict[str, Any], **fields: Any) -> Any:
    """A recipe whose student, and whose teacher where it trains, is a folder with nothing but a config."""
    folder = tmp_path / kind
    AutoConfig.for_model(kind, vocab_size=128, **fields).save_pretrained(folder)
    taught = {"teacher": {"path": str(folder)}} if "distill" in stage else {}
    data = {"files": ["x/*.txt"], "seq_length": 32, "packing": False}
    return recipe_from_dict({"name": kind, **taught, "student": {"path": str(folder)}, "data": data, "stages": [stage]}, ())


def planned(tmp_path: Path, kind: str, stage: dict[str, Any], **fields: Any) -> Plan:
    return plan(recipe(tmp_path, kind, stage, **fields))


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_with_other_names_in_their_configs_have_a_plan(tmp_path: Path, kind: str) -> None:
    made = planned(tmp_path, kind, {"distill": {"steps": 4}}, **FAMILIES[kind])
    training = made.stages[0].training
    assert training is not None
    assert training.memory.total > 4 * 4 * made.stages[0].parameters / 2
    assert training.memory.activations > 0
    assert f"{kind}, 2 layers, hidden 32" in made.student


_NEOX = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_FORMATS = {"formats": ["compressed-tensors", "gptq", "awq", "safetensors"]}
_GROUPED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "num_kv_heads": 2, "new_decoder_architecture": True}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["gpt_neox", "opt", "falcon", "bloom", "mpt", "gptj", "gpt_neo"])
def test_an_export_is_judged_by_the_linears_that_the_family_has(tmp_path: Path, kind: str, ranks: int) -> None:
    fields = {**FAMILIES, "gpt_neox": _NEOX}[kind]
    recipe(tmp_path, kind, QUANTIZE, **fields)  # writes the folder
    stages = [QUANTIZE, {"export": _FORMATS}]
    folder = str(tmp_path / kind)
    both = recipe_from_dict({"name": kind, "student": {"path": folder}, "data": {"files": ["x"], "seq_length": 32}, "stages": stages}, ())
    export = plan(both, tensor_parallel=ranks).stages[1]
    assert list(export.exports) == _FORMATS["formats"] and export.refusals == []
    told = " ".join(f"{verdict.reason} {verdict.fix}" for verdict in export.verdicts)
    assert "structured.ffn" not in told  # no stage prunes channels of these families
    model = shape_of(AutoConfig.from_pretrained(tmp_path / kind), "a test")
    kinds = {model.kind_of(name) for name in model.linears}
    named = re.findall(r"([\w.]+) is [\d,]+ x", told)
    assert named and set(named) <= kinds


def test_heads_are_counted_by_the_familys_own_names(tmp_path: Path) -> None:
    config = AutoConfig.for_model("falcon", vocab_size=128, **_GROUPED)
    config.save_pretrained(tmp_path / "falcon")
    stages = [{"quantize": {"weights": {"bits": 4, "group_size": 16}}}, {"export": {}}]
    made = {"name": "f", "student": {"path": str(tmp_path / "falcon")}, "data": {"files": ["x"], "seq_length": 32}, "stages": stages}
    (found,) = [v for v in plan(recipe_from_dict(made, ()), tensor_parallel=3).stages[1].verdicts if v.target == "vLLM"]
    assert "8 heads cannot be distributed over 3 GPUs" in found.reason
    assert "2 key/value heads can neither be distributed over 3 GPUs" in found.reason


@pytest.mark.parametrize("stage", [QUANTIZE, {"prune": {"magnitude": {"keep": 0.5}}}, {"qat": {"steps": 4, "weights": {"group_size": 16}}}])
def test_what_reaches_no_weight_is_refused_even_when_part_is_agreed_to(tmp_path: Path, stage: dict[str, Any]) -> None:
    (kind, settings), *_ = stage.items()
    for allowed in (False, True):
        with pytest.raises(ImpossibleStageError, match=rf"01-{kind}: model type 'gpt2': none of its decoder weights.*Conv1D.*families.md"):
            planned(tmp_path, "gpt2", {kind: {**settings, "allow_partial": allowed}}, **_GPT2)


def test_pruning_weights_is_named_as_the_other_way_only_where_it_works(tmp_path: Path) -> None:
    stage = {"prune": {"structured": {"ffn": 16}}}
    missing = r"its axis map is missing, .* of .*transformer\.h\.\*\.mlp\.dense_h_to_4h\.weight, "
    with pytest.raises(ImpossibleStageError, match=rf"'bloom': {missing}.*; pruning channels .*; use prune\.magnitude, or a model"):
        planned(tmp_path, "bloom", stage, **FAMILIES["bloom"])
    with pytest.raises(ImpossibleStageError, match=r"'mixtral': it is a mixture of experts, .*; use a model of one of these"):
        planned(tmp_path, "mixtral", stage, **_MIXTRAL)


def test_a_part_of_the_weights_is_refused_unless_it_is_agreed_to(tmp_path: Path) -> None:
    with pytest.raises(ImpossibleStageError, match=r"'mixtral': only 14\.2%.*3-dimensional.*stages\.0\.quantize\.allow_partial=true"):
        planned(tmp_path, "mixtral", QUANTIZE, **_MIXTRAL)
    made = planned(tmp_path, "mixtral", {"quantize": {**QUANTIZE["quantize"], "allow_partial": True}}, **_MIXTRAL)
    assert made.stages[0].coverage == pytest.approx(0.1424, abs=1e-3)
    assert "01-quantize: quantizes 14.2% of the decoder's weights\n" in short_form(made)
    silent = replace(made, stages=[replace(made.stages[0], not_exported="model type 'x': why")])
    assert "of the decoder's weights; its result cannot be exported: model type 'x': why" in short_form(silent)


def test_what_skip_names_needs_no_further_word(tmp_path: Path) -> None:
    stage = {"quantize": {**QUANTIZE["quantize"], "skip": ["*.fc2"]}}
    made = planned(tmp_path, "opt", stage, **_OPT)
    assert made.stages[0].coverage == pytest.approx(1 - 2 * 64 * 32 / (2 * (4 * 32 * 32 + 2 * 64 * 32)))


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"prune": {"structured": {"ffn": 32}}}, "'gemma': its axis map is missing"),
        ({"distill": {"steps": 4}}, "is_causal=false"),
    ],
)
def test_a_run_stops_before_work_with_one_message(tmp_path: Path, stage: dict[str, Any], words: str) -> None:
    fields = {"is_causal": False} if "distill" in stage else {}
    kind = "gemma" if "prune" in stage else "llama"
    asked = recipe(tmp_path, kind, stage, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **fields)
    with pytest.raises(UserError, match=words):
        check_before_run(asked, tmp_path / "out", Console(quiet=True))


def test_a_student_cannot_be_cut_from_a_family_without_a_map(tmp_path: Path) -> None:
    AutoConfig.for_model("bloom", vocab_size=128, **FAMILIES["bloom"]).save_pretrained(tmp_path / "bloom")
    plain = {"name": "x", "teacher": {"path": str(tmp_path / "bloom")}, "student": {"keep": {"layers": 2}}, "data": {"files": ["x"]}}
    with pytest.raises(ImpossibleStageError, match=r"student\.keep: model type 'bloom'"):
        plan(recipe_from_dict({**plain, "stages": [{"distill": {"steps": 1}}]}, ()))


def test_pruning_to_the_present_width_is_no_stage(tmp_path: Path) -> None:
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(ImpossibleStageError, match="ffn=64 keeps all FFN channels"):
        planned(tmp_path, "llama", {"prune": {"structured": {"ffn": 64}}}, **fields)
    made = planned(tmp_path, "llama", {"prune": {"structured": {"ffn": 32}}}, **fields)
    assert made.stages[0].coverage == pytest.approx(3 * 64 / (3 * 64 + 4 * 32))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi3", "opt", "gpt2"])
def test_later_stages_are_planned_with_the_shape_that_pruning_leaves(tmp_path: Path, kind: str) -> None:
    own = kind in LAYER_NORM
    kept = {"ffn": 9, "heads" if own else "kv_heads": 3 if own else 1, "hidden": 12, "layers": 3}
    folder = tmp_path / kind
    tiny(kind).config.save_pretrained(folder)
    data = {"files": ["x/*.txt"], "seq_length": 32, "packing": False}
    stages = [{"prune": {"structured": kept}}, {"pretrain": {"steps": 4}}]
    made = plan(recipe_from_dict({"name": kind, "student": {"path": str(folder)}, "data": data, "stages": stages}, ()))
    indices = list(range(3))
    lists = {"ffn": [list(range(9))] * 3, "heads": [indices] * 3, "hidden": list(range(12))}
    student = cut(tiny(kind), Kept(layers=indices, **lists, kv_heads=None if own else [[0]] * 3))
    real = sum(parameter.numel() for parameter in student.parameters())
    assert [stage.parameters for stage in made.stages] == [real, real]
    assert made.stages[0].coverage == 1
    assert "3 layers, hidden 12" in made.stages[1].shape


def test_a_plan_says_which_widths_kernels_pad_and_what_vllm_reads(tmp_path: Path) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4}
    made = planned(tmp_path, "qwen2", {"prune": {"structured": {"ffn": 1500, "heads": 12, "hidden": 1000}}}, **wide)
    assert made.stages[0].notes == [
        "structured.ffn=1500 is not a multiple of 128: groups of 128 do not divide the down projection, and packed int4 kernels pad it or "
        "fall back; use 1408 or 1536",
        "structured.hidden=1000 is not a multiple of 128: groups of 128 do not divide the projections that read the hidden states, and "
        "packed int4 kernels pad it or fall back; use 896 or 1024",
        "vLLM's own qwen2 takes head_dim as hidden / heads, which is not 64 in this shape; keep hidden = heads x 64, or serve with "
        "--model-impl transformers",
    ]
    assert "01-prune: structured.ffn=1500 is not a multiple of 128" in short_form(made)
    assert planned(tmp_path, "qwen2", {"prune": {"structured": {"ffn": 1536, "heads": 12, "hidden": 768}}}, **wide).stages[0].notes == []


def test_shapes_that_a_family_does_not_take_are_refused_by_the_plan(tmp_path: Path) -> None:
    with pytest.raises(
        ImpossibleStageError, match=r"01-prune: structured.heads=2: gpt2 has no head_dim of its own, .*structured.hidden=16"
    ):
        planned(tmp_path, "gpt2", {"prune": {"structured": {"heads": 2}}}, **_GPT2)
    planned(tmp_path, "gpt2", {"prune": {"structured": {"heads": 2, "hidden": 16}}}, **_GPT2)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_pattern_that_does_not_divide_is_refused_before_work(tmp_path: Path, method: str) -> None:
    fields = {**_LLAMA, "intermediate_size": 66}
    told = (
        rf"^stages\.0\.prune\.{method}\.pattern 2:4: model\.layers\.0\.mlp\.down_proj has 66 inputs, which groups of 4 do not divide "
        r"\(2 linears in all\); groups of 2 divide all inputs"
    )
    with pytest.raises(ImpossibleStageError, match=told):
        planned(tmp_path, "llama", {"prune": {method: {"pattern": "2:4"}}}, **fields)
    made = planned(tmp_path, "llama", {"prune": {method: {"pattern": "1:2"}}}, **fields)
    assert made.stages[0].coverage == pytest.approx(1)


def test_sparsegpt_needs_as_many_tokens_as_inputs(tmp_path: Path) -> None:
    few = {"prune": {"sparsegpt": {"keep": 0.5}, "calibration_tokens": 33}}
    told = r"stages\.0\.prune\.calibration_tokens: 64 tokens are too few for a matrix with 96 inputs; SparseGPT needs at least as many"
    with pytest.raises(ImpossibleStageError, match=told):
        planned(tmp_path, "llama", few, **{**_LLAMA, "intermediate_size": 96})
    few["prune"]["wanda"] = few["prune"].pop("sparsegpt")
    values = {value.key: value for value in planned(tmp_path, "llama", few, **_LLAMA).stages[0].values}
    assert (values["stages.0.prune.calibration_tokens"].value, values["stages.0.prune.calibration_tokens"].origin) == (33, "recipe")
    del few["prune"]["calibration_tokens"]
    values = {value.key: value for value in planned(tmp_path, "llama", few, **_LLAMA).stages[0].values}
    assert (values["stages.0.prune.calibration_tokens"].value, values["stages.0.prune.calibration_tokens"].origin) == (262_144, "default")


def test_families_whose_linears_cannot_be_calibrated_are_pruned_by_magnitude(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "num_hidden_layers": 2, "state_size": 4}
    with pytest.raises(ImpossibleStageError, match=r"model type 'mamba': mixer\.dt_proj .* did not run.*; use prune\.magnitude \("):
        planned(tmp_path, "mamba", {"prune": {"wanda": {"keep": 0.5}}}, **wide)
    assert planned(tmp_path, "mamba", {"prune": {"magnitude": {"keep": 0.5}}}, **wide).stages


def test_scores_and_what_they_prune_count_in_memory_and_checkpoints(tmp_path: Path) -> None:
    sizes = []
    for method in ("magnitude", "movement"):
        asked = recipe(tmp_path, "llama", {"prune": {method: {"keep": 0.5}, "steps": 4, "loss": {"hard_weight": 0.5}}}, **_LLAMA)
        training = plan(asked).stages[0].training
        assert training is not None
        sizes.append((training.memory.total, training.checkpoint_bytes))
    # two fp32 numbers for each weight of the linears
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert [now - before for before, now in zip(*sizes, strict=True)] == [8 * weights, 8 * weights]


_LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def refused(asked: Any, tmp_path: Path) -> str:
    """What ``decoct run`` says before any work."""
    with pytest.raises(UserError) as caught:
        check_before_run(asked, tmp_path / "out", Console(quiet=True))
    return str(caught.value)


def test_a_run_stops_before_work_if_a_stage_keeps_more_channels_than_there_are(tmp_path: Path) -> None:
    asked = recipe(tmp_path, "llama", {"prune": {"structured": {"ffn": 96}}}, **_LLAMA)
    assert refused(asked, tmp_path) == "01-prune: structured.ffn=96 keeps more FFN channels than the student's 64; give at most 64"


def test_a_run_stops_before_work_if_its_student_cannot_be_made(tmp_path: Path) -> None:
    asked = recipe(tmp_path, "llama", {"distill": {"steps": 4}}, **_LLAMA)
    for student, words in (
        ({"keep": {"layers": 3}}, "student.keep.layers=3 cannot be cut from a teacher of 2 layers; "),
        ({"keep": {"layers": [1, 2]}}, "student.keep.layers=[1, 2]: layer 2 does not exist in a teacher of 2 layers, counted from 0; "),
        ({"config": {"model_type": "lama"}}, "student.config.model_type='lama' is not a causal language model of transformers; use llama"),
        ({"config": {"model_type": "llama", "hidden_size": "1_"}}, "student.config is refused by transformers: Validation error for field"),
        ({"config": {"model_type": "llama", "hidden_size": 64.5}}, "student.config: hidden_size is 64.5; a whole number up to "),
    ):
        made = recipe_from_dict({"name": "x", "teacher": {"path": asked.teacher.path}, "student": student,
                                 "data": {"files": ["x"]}, "stages": [{"distill": {"steps": 4}}]}, ())  # fmt: skip
        told = refused(made, tmp_path)
        assert told.startswith(words)
        assert "\n" not in told
    lost = replace(recipe_from_dict({"name": "x", "teacher": {"path": asked.teacher.path}, "student": {"keep": {"layers": 2}},
                                     "data": {"files": ["x"]}, "stages": [{"distill": {"steps": 4}}]}, ()), teacher=None)  # fmt: skip
    assert refused(lost, tmp_path) == "student.keep needs a teacher to cut the student from; add one, or use student.path"


def test_what_was_seen_of_a_family_is_refused_with_the_way_around(tmp_path: Path) -> None:
    gptq = {"quantize": {**QUANTIZE["quantize"], "method": "gptq"}}
    wide = {"hidden_size": 256, "num_hidden_layers": 2, "state_size": 4}
    with pytest.raises(
        ImpossibleStageError, match=r"01-quantize: model type 'mamba': mixer\.dt_proj .* did not run.*use method rtn or mse"
    ):
        planned(tmp_path, "mamba", gptq, **wide)
    skipping = {"quantize": {**gptq["quantize"], "skip": ["*.dt_proj", "*.x_proj"]}}
    assert planned(tmp_path, "mamba", skipping, **wide).stages[0].coverage == pytest.approx(0.9, abs=0.1)
    packed = recipe(tmp_path, "opt", {"distill": {"steps": 4}}, **_OPT)
    with pytest.raises(ImpossibleStageError, match=r"the student, model type 'opt': .* apart; set data\.packing: false"):
        plan(replace(packed, data=replace(packed.data, packing=True)))


def test_an_encoder_is_refused_unless_it_is_told_to_decode(tmp_path: Path) -> None:
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(ImpossibleStageError, match=r"sees later tokens: config\.json has is_decoder=false"):
        planned(tmp_path, "bert-generation", {"distill": {"steps": 4}}, **fields)
    assert planned(tmp_path, "bert-generation", {"distill": {"steps": 4}}, **fields, is_decoder=True).stages


def test_a_gguf_of_a_weight_that_llama_cpp_has_not_is_refused_before_work(tmp_path: Path) -> None:
    fields = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "attention_bias": True}
    asked = recipe(tmp_path, "qwen3", QUANTIZE, **fields)
    exporting = recipe_from_dict(
        {
            "name": "x",
            "student": {"path": str(tmp_path / "qwen3")},
            "data": {"files": ["x"]},
            "stages": [QUANTIZE, {"export": {"formats": ["gguf"]}}],
        },
        (),
    )
    assert plan(asked).stages
    told, *_ = problems(plan(exporting))
    assert re.match(r"02-export: gguf cannot hold this model: .*q_proj\.bias", told)


def test_a_teacher_that_does_not_run_in_bf16_is_asked_for_in_fp32(tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    AutoConfig.for_model("xlstm", vocab_size=128, hidden_size=64, num_heads=4, num_blocks=2, embedding_dim=64).save_pretrained(teacher)
    AutoConfig.for_model("opt", vocab_size=128, **_OPT).save_pretrained(student)
    for load_in in ("bf16", "fp32"):
        plain: dict[str, Any] = {"name": "x", "teacher": {"path": str(teacher), "load_in": load_in}, "student": {"path": str(student)}}
        asked = recipe_from_dict({**plain, "data": {"files": ["x"], "packing": False}, "stages": [{"distill": {"steps": 1}}]}, ())
        if load_in == "fp32":
            assert plan(asked).stages
        else:
            with pytest.raises(ImpossibleStageError, match=r"the teacher in bf16, model type 'xlstm'.*teacher\.load_in: fp32"):
                plan(asked)


def test_a_cut_after_a_pattern_is_noted_unless_it_takes_whole_layers(tmp_path: Path) -> None:
    masked, cut = {"prune": {"magnitude": {"pattern": "2:4"}}}, {"prune": {"structured": {"ffn": 32}}}

    def noted(*stages: dict[str, Any]) -> list[str]:
        AutoConfig.for_model("llama", vocab_size=128, **{**_LLAMA, "num_hidden_layers": 4}).save_pretrained(tmp_path / "llama")
        given = {"student": {"path": str(tmp_path / "llama")}, "data": {"files": ["x/*.txt"], "seq_length": 32}, "stages": list(stages)}
        return [note for stage in plan(recipe_from_dict({"name": "x", **given}, ())).stages for note in stage.notes if "pattern" in note]

    (note,) = noted(masked, cut)
    assert note.startswith("the 2:4 pattern of stages.0 does not hold after this cut")
    assert not noted(cut, masked) and not noted(masked, {"prune": {"structured": {"layers": 2}}})
