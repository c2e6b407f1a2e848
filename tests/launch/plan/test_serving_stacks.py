"""What serving stacks are said to make of an export, and the nearest setting that does."""

from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from decoct.launch.plan.format_limits import planned_model
from decoct.launch.plan.recipe_remedies import RecipeRemedies
from decoct.launch.plan.serving_stacks import Verdict, verdicts
from decoct.launch.plan.shapes import shape_of
from decoct.qat.scheme import QuantScheme, SpecChange
from decoct.qat.spec import QuantSpec


def _llama(**changes: Any) -> LlamaConfig:
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8}
    return LlamaConfig(vocab_size=32000, **{**shape, **changes})


def _verdicts(config: PreTrainedConfig, scheme: QuantScheme, formats: tuple[str, ...], ranks: int = 1) -> list[Verdict]:
    remedies = RecipeRemedies(shape_of(config, "a test"), scheme, formats)
    return verdicts(planned_model(remedies), remedies, tensor_parallel=ranks)


def _of(
    config: PreTrainedConfig,
    target: str = "vLLM",
    ranks: int = 1,
    skip: tuple[str, ...] = (),
    formats: tuple[str, ...] = ("compressed-tensors",),
    other: dict[str, Any] | None = None,
    **spec: Any,
) -> tuple[str, str, str]:
    scheme = QuantScheme(weights=QuantSpec(**spec), skip=skip, **(other or {}))
    (found,) = [v for v in _verdicts(config, scheme, formats, ranks) if v.target == target]
    return found.outcome, found.reason, found.fix


def test_a_plain_int4_llama_loads_on_the_fast_path() -> None:
    for target in ("vLLM", "SGLang", "transformers"):
        assert _of(_llama(), target)[0] == "ok"
    assert _of(_llama(), bits=8, group_size="channel")[0] == "ok"


@pytest.mark.parametrize(
    ("changes", "spec", "ranks", "outcome", "reason", "fix"),
    [
        ({}, {"bits": 3}, 1, "no", "4 and 8 bits, not 3", "weights.bits=4"),
        ({}, {"group_size": 16}, 1, "no", "Marlin takes groups of 32, 64, 128", "weights.group_size=32"),
        ({"intermediate_size": 8256}, {"group_size": 64}, 1, "slower", "gate_proj is 8,256", ""),
        ({"intermediate_size": 8224}, {"group_size": 32}, 1, "slower", "8,224", "prune.structured.ffn=8192"),
        ({"intermediate_size": 8064}, {}, 2, "no", "down_proj has 8,064 inputs", "prune.structured.ffn=7936"),
        ({"num_key_value_heads": 8}, {}, 16, "ok", "padded", ""),
        (
            {"num_attention_heads": 32, "num_key_value_heads": 4},
            {},
            6,
            "no",
            "32 heads cannot be distributed over 6",
            "--tensor-parallel 4",
        ),
    ],
)
def test_what_marlin_and_tensor_parallelism_want(
    changes: dict[str, Any], spec: dict[str, Any], ranks: int, outcome: str, reason: str, fix: str
) -> None:
    found = _of(_llama(**changes), ranks=ranks, **spec)
    if outcome == "slower" and not fix:
        # 8,256 = 64 x 129: outputs of 64 and inputs of 128 do, so does down_proj with inputs of 64 and outputs of 128
        assert found[0] == "ok"
        return
    assert found[0] == outcome, found
    assert reason in found[1]
    assert fix in found[2]


def test_whole_rows_have_no_group_to_cut() -> None:
    outcome, reason, fix = _of(_llama(intermediate_size=8065), ranks=2, bits=8, group_size="channel")
    assert outcome == "no"
    assert "down_proj has 8,065 inputs, and they cannot be cut evenly over 2 GPUs" in reason
    assert "prune.structured.ffn=" in fix
    grouped = _of(_llama(intermediate_size=8064), ranks=2)[1]
    assert "down_proj has 8,064 inputs, and a GPU's share of them is not a multiple of the group size 128" in grouped


def test_the_named_ffn_really_is_legal() -> None:
    for ffn, ranks in ((8064, 2), (9000, 4), (5000, 1)):
        _, _, fix = _of(_llama(intermediate_size=ffn), ranks=ranks)
        nearest = int(fix.partition("prune.structured.ffn=")[2].split(";")[0])
        assert nearest < ffn
        assert _of(_llama(intermediate_size=nearest), ranks=ranks)[0] == "ok", (ffn, ranks, nearest)


def test_fused_projections_need_one_scheme() -> None:
    outcome, reason, fix = _of(_llama(), skip=("*.q_proj",))
    assert outcome == "no"
    assert "skip leaves out only q_proj" in reason
    assert fix == "skip=[*.q_proj,*.k_proj,*.v_proj]"
    assert _of(_llama(), skip=("*.q_proj", "*.k_proj", "*.v_proj"))[0] == "ok"
    assert _of(_llama(), skip=("*.down_proj",))[0] == "ok"


def test_every_lattice_of_a_mixed_model_is_judged() -> None:
    odd = {"overrides": {"*.down_proj": SpecChange(bits=3)}}
    outcome, reason, fix = _of(_llama(), other=odd)
    assert (outcome, "4 and 8 bits, not 3" in reason, fix) == ("no", True, "{bits: 4} in overrides for mlp.down_proj")
    assert _of(_llama(), other={"overrides": {"*.down_proj": SpecChange(bits=8)}})[0] == "ok"
    apart = _of(_llama(), other={"overrides": {"*.1.self_attn.q_proj": SpecChange(bits=8)}})
    assert apart[0] == "no" and "q_proj 8 bits in groups of 128 and k_proj 4 bits in groups of 128 differ" in apart[1]
    assert apart[2] == "let overrides name all of q_proj, k_proj, v_proj alike, or none"


def test_what_no_format_holds_is_said() -> None:
    ways = "weights.kind=nvfp4 weights.group_size=16, or weights.kind=int, or export.formats=[safetensors-f32]"
    assert _of(_llama(), kind="nf4")[::2] == ("no", ways)
    assert _of(_llama(), "llama.cpp", formats=("gguf",), kind="nf4")[2] == "weights.kind=int", "it reads no other format"
    assert _of(_llama(), group_size="tensor")[0] == "ok", "it is served as one scale a row"
    embedding = {"embedding": SpecChange(bits=8)}
    assert _of(_llama(), other=embedding)[::2] == ("no", "leave embedding out")
    assert _of(_llama(), "llama.cpp", formats=("gguf",), other=embedding)[0] == "ok"


def test_nf4_and_int8_inputs_load_where_bitsandbytes_is_read() -> None:
    outcome, reason, _ = _of(_llama(), "transformers", formats=("bitsandbytes",), kind="nf4", group_size=64)
    assert outcome == "ok" and reason
    assert _of(_llama(), formats=("bitsandbytes",), kind="nf4", group_size=64)[0] == "no", "vLLM was not tried"


def test_qwen2_has_no_head_dim_of_its_own_in_vllm() -> None:
    config = Qwen2Config(hidden_size=896, num_attention_heads=7, num_key_value_heads=1, intermediate_size=4864, num_hidden_layers=2)
    config.head_dim = 64
    outcome, reason, fix = _of(config)
    assert (outcome, "head_dim = hidden / heads" in reason) == ("no", True)
    assert "--model-impl transformers" in fix
    config.head_dim = 128
    assert "head_dim" not in _of(config)[1]


def test_blocks_of_llama_cpp_and_onnx() -> None:
    assert _of(_llama(), "llama.cpp")[::2] == ("no", "export.formats=[compressed-tensors,gguf]")
    assert _of(_llama(), "llama.cpp", formats=("gguf",)) == ("ok", "its blocks hold groups of this size exactly", "")
    assert _of(_llama(), formats=("gguf",))[::2] == ("no", "export.formats=[gguf,compressed-tensors]")
    outcome, reason, fix = _of(_llama(), "llama.cpp", formats=("gguf",), group_size=16)
    assert (outcome, "multiple" in reason, fix) == ("no", True, "weights.group_size=32")
    assert _of(_llama(), "llama.cpp", formats=("gguf",), bits=6)[::2] == ("slower", "weights.bits=8")
    narrow = _of(_llama(intermediate_size=8200), "llama.cpp", formats=("gguf",), group_size="channel")
    assert narrow[0] == "no"
    assert "prune.structured.ffn=8192" in narrow[2]
    unknown = _of(_llama(hidden_act="gelu"), "llama.cpp", formats=("gguf",))
    assert unknown[0] == "no"
    assert "llama.cpp computes silu" in unknown[1]
    assert _of(_llama(), "llama.cpp", formats=("gguf",), bits=5)[0] == "ok"
    two = _of(_llama(), "llama.cpp", formats=("gguf",), bits=2)
    assert (two[0], "export.formats=[gguf-q2_0]" in two[2]) == ("slower", True)
    assert _of(_llama(), "llama.cpp", formats=("gguf-q2_0",), bits=2)[0] == "ok"
    kinds: list[dict[str, Any]] = [{"kind": "q4_k"}, {"kind": "mxfp4", "group_size": 32}, {"ternary": True, "group_size": 256}]
    for own in kinds:
        assert _of(_llama(), "llama.cpp", formats=("gguf",), **own)[0] == "ok", own
        assert _of(_llama(), "OpenVINO", formats=("gguf",), **own)[0] == "slower", own
    assert _of(_llama(), "llama.cpp", formats=("gguf",), bits=3, symmetric=False)[0] == "ok"
    for bits in (5, 8):
        wide = _of(_llama(), "llama.cpp", formats=("gguf",), bits=bits, symmetric=False)
        assert wide[::2] == ("no", "weights.symmetric=true, or weights.bits=4")
    assert "powers of two" in _of(_llama(), "ONNX Runtime", formats=("gptq",), group_size="channel")[1]


def test_each_format_is_judged_for_itself() -> None:
    """What one stack reads of several formats is told of each, and never of one that it does not know."""
    scheme = QuantScheme(weights=QuantSpec(bits=4, group_size=64))
    formats = ("compressed-tensors", "gptq", "awq", "gguf", "safetensors")
    found = _verdicts(_llama(), scheme, formats)
    loads = {form: {v.target for v in found if v.format == form and v.outcome == "ok"} for form in formats}
    servers = {"vLLM", "SGLang", "transformers"}
    assert loads == {
        "compressed-tensors": servers,
        "gptq": servers | {"ONNX Runtime"},
        "awq": servers | {"ONNX Runtime", "mlx-lm"},
        "gguf": {"llama.cpp", "OpenVINO"},
        "safetensors": servers,
    }
    onnx = next(v for v in found if v.target == "ONNX Runtime")
    assert "nodes_to_exclude=/lm_head/MatMul shared_embeddings=false accuracy_level=1" in onnx.reason


def test_what_a_stack_misreads_is_not_recommended() -> None:
    outcome, reason, fix = _of(_llama(), "ONNX Runtime", formats=("gptq_v2", "gguf"), symmetric=False)
    assert (outcome, "misreads gptq_v2" in reason, fix) == ("no", True, "export.formats=[gguf,awq]")
    assert _of(_llama(), "ONNX Runtime", formats=("gptq_v2",))[2] == "export.formats=[gptq]"
    assert _of(_llama(), "ONNX Runtime")[1] == "it reads gptq or awq, which this stage does not write"
    assert _of(_llama(), "mlx-lm", formats=("awq",), group_size="channel")[::2] == ("no", "weights.group_size=64")


def test_plain_weights_are_asked_for_no_kernels() -> None:
    for form in ("safetensors", "safetensors-f32"):
        assert _of(_llama(), formats=(form,), bits=3, group_size=16)[0] == "ok"
        assert _of(_llama(num_attention_heads=30, hidden_size=1920), formats=(form,), ranks=4)[0] == "no", (
            "heads are dealt out all the same"
        )


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"kind": "mxfp4", "group_size": 32}, "Marlin, W4A16 in mxfp4"),
        ({"kind": "nvfp4", "group_size": 16}, "Marlin, W4A16 in nvfp4"),
        ({"kind": "fp8_e4m3", "bits": 8, "group_size": "channel"}, "Marlin, W8A16 in fp8_e4m3"),
    ],
)
def test_floats_have_kernels_of_their_own(spec: dict[str, Any], said: str) -> None:
    assert _of(_llama(), **spec) == ("ok", said, "")
    assert _of(_llama(), "transformers", **spec)[0] == "ok"
    outcome, reason, fix = _of(_llama(), formats=("gptq",), **spec)
    assert outcome == "no"
    assert "kind=int" in fix
    assert "compressed-tensors" in fix
    assert f"holds integer codes, not kind={spec['kind']}" in reason
