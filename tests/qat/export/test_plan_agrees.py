"""What the plan says of a format before training is what its exporter does with the folder after it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import save_file

from decoct.launch.plan.export_sizes import export_bytes
from decoct.launch.plan.format_limits import format_problems, planned_model
from decoct.launch.plan.recipe_remedies import RecipeRemedies
from decoct.launch.plan.shapes import shape_of
from decoct.models.common.errors import UserError
from decoct.models.folder.loading import load_config
from decoct.models.folder.record import seal_record
from decoct.qat.codes.kv_cache_scales import CacheState
from decoct.qat.codes.state import load_quant_state
from decoct.qat.export import check_limits
from decoct.qat.export.export import EXPORTERS, export_folder
from decoct.qat.export.limits.formats import LIMITS, refusals
from decoct.qat.scheme import QuantScheme, SpecChange
from decoct.qat.source.quantized_source import open_source
from decoct.qat.spec import ActivationSpec, QuantSpec
from decoct.trainer.settings import ExportSettings

Build = Callable[..., Path]
FORMATS: tuple[str, ...] = get_args(get_args(get_type_hints(ExportSettings)["formats"])[0])
FOUR, EIGHT = QuantSpec(bits=4, group_size=32), QuantSpec(bits=8, group_size="channel")
FLOAT8 = QuantSpec(kind="fp8_e4m3", bits=8, group_size="channel")
WIDE: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 64, "head_dim": 16, "intermediate_size": 64, "vocab_size": 320}
BLOCKS: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
FP8 = ActivationSpec(kind="fp8_e4m3", scaling="static")


@dataclass(frozen=True)
class Case:
    """One model."""

    holds: str
    """The formats that hold it, by name."""
    scheme: QuantScheme
    family: str = "llama"
    changes: dict[str, Any] = field(default_factory=dict)
    """Of ``WIDE``."""
    beyond: dict[str, ActivationSpec] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """Of the export."""


def of(spec: QuantSpec, **more: Any) -> QuantScheme:
    return QuantScheme(weights=spec, **more)


F32 = "safetensors-f32"
CASES = {
    "int4": Case(f"compressed-tensors gptq gptq_v2 awq gguf safetensors {F32}", of(FOUR)),
    "int8 by row": Case(f"compressed-tensors gptq gptq_v2 gguf {F32}", of(EIGHT)),
    "int8 by matrix": Case(f"compressed-tensors gptq gptq_v2 gguf {F32}", of(QuantSpec(bits=8, group_size="tensor"))),
    "int2 in groups of 64": Case(f"compressed-tensors gptq gptq_v2 gguf gguf-q2_0 safetensors {F32}", of(QuantSpec(bits=2, group_size=64))),
    "ternary": Case(
        f"compressed-tensors gptq gptq_v2 gguf gguf-q2_0 gguf-tq1_0 safetensors {F32}",
        of(QuantSpec(ternary=True, group_size=256)),
        changes=BLOCKS,
    ),
    "ternary in groups of 32": Case(f"compressed-tensors gptq gptq_v2 gguf safetensors {F32}", of(QuantSpec(ternary=True, group_size=32))),
    "int3": Case(f"gguf safetensors {F32}", of(QuantSpec(bits=3, group_size=32))),
    "int3, reader named": Case("compressed-tensors", of(QuantSpec(bits=3, group_size=32)), options={"reader_version": "0.18.0"}),
    "int3, old reader": Case("", of(QuantSpec(bits=3, group_size=32)), options={"reader_version": "0.17.1"}),
    "int6": Case(f"gguf {F32}", of(QuantSpec(bits=6, group_size=32))),
    "int4 with zero points": Case(f"compressed-tensors gptq_v2 awq gguf {F32}", of(replace(FOUR, symmetric=False))),
    "int5 with zero points": Case(F32, of(QuantSpec(bits=5, group_size=32, symmetric=False))),
    "int8 with zero points": Case(f"compressed-tensors gptq_v2 {F32}", of(replace(EIGHT, symmetric=False))),
    "int4 in groups of 16": Case(f"compressed-tensors gptq gptq_v2 awq safetensors {F32}", of(QuantSpec(bits=4, group_size=16))),
    "int4 with fp32 scales": Case(F32, of(replace(FOUR, scale_grid="fp32"))),
    "int4 with fp16 scales": Case(f"gptq gptq_v2 awq gguf {F32}", of(replace(FOUR, scale_grid="fp16"))),
    "int8, rounding allowed": Case("safetensors", of(EIGHT), options={"allow_inexact": True}),
    "nf4": Case(F32, of(QuantSpec(kind="nf4", group_size=32))),
    "nf4 in groups of 64": Case(f"bitsandbytes {F32}", of(QuantSpec(kind="nf4", group_size=64))),
    "mxfp4": Case(f"compressed-tensors gguf safetensors {F32}", of(QuantSpec(kind="mxfp4", group_size=32))),
    "nvfp4": Case(f"compressed-tensors {F32}", of(QuantSpec(kind="nvfp4", group_size=16))),
    "fp8 by row": Case(f"compressed-tensors {F32}", of(FLOAT8)),
    "fp8 by matrix": Case(f"compressed-tensors {F32}", of(replace(FLOAT8, group_size="tensor"))),
    "fp8 with fp32 scales": Case(F32, of(replace(FLOAT8, scale_grid="fp32"))),
    "nvfp4 with an fp8 FFN": Case(
        f"compressed-tensors {F32}",
        of(QuantSpec(kind="nvfp4", group_size=16), overrides={"*.mlp.*": SpecChange(kind="fp8_e4m3", group_size="channel")}),
    ),
    "mxfp4, q apart": Case(
        F32,
        of(QuantSpec(kind="mxfp4", group_size=32), overrides={"*.q_proj": SpecChange(kind="fp8_e4m3", group_size="channel")}),
    ),
    "q4_k": Case(f"gguf {F32}", of(QuantSpec(kind="q4_k")), changes=BLOCKS),
    "q6_k": Case(f"gguf {F32}", of(QuantSpec(kind="q6_k"), embedding=SpecChange(kind="q6_k")), changes=BLOCKS),
    "a mixture": Case(
        f"gguf {F32}", of(QuantSpec(kind="q4_k"), mix="q4_k_m"), changes=BLOCKS | {"num_hidden_layers": 3, "intermediate_size": 288}
    ),
    "q3_k and others": Case(
        f"gguf {F32}", of(QuantSpec(kind="q3_k"), overrides={"*.v_proj": SpecChange(kind="int", bits=8, group_size=32)}), changes=BLOCKS
    ),
    "an odd FFN": Case(f"compressed-tensors safetensors {F32}", of(replace(FOUR, group_size="channel")), changes={"intermediate_size": 60}),
    "a narrow FFN": Case(
        f"compressed-tensors gptq gptq_v2 awq safetensors {F32}", of(replace(FOUR, group_size="channel")), changes={"intermediate_size": 56}
    ),
    "an embedding": Case(f"gguf safetensors {F32}", of(FOUR, embedding=SpecChange(bits=4))),
    "a head": Case(
        f"compressed-tensors gptq gptq_v2 gguf safetensors {F32}", of(FOUR, head=SpecChange(bits=4)), changes={"tie_word_embeddings": False}
    ),
    "q apart": Case(f"gguf {F32}", of(FOUR, overrides={"*.q_proj": SpecChange(bits=8)})),
    "q left out": Case(f"compressed-tensors gptq gptq_v2 awq gguf safetensors {F32}", of(FOUR, skip=("*.q_proj",))),
    "q left out, k apart": Case(f"gguf {F32}", of(FOUR, skip=("*.q_proj",), overrides={"*.k_proj": SpecChange(bits=8)})),
    "two group sizes": Case(
        f"compressed-tensors gptq gptq_v2 gguf safetensors {F32}", of(FOUR, overrides={"*.down_proj": SpecChange(group_size=64)})
    ),
    "int8 inputs": Case("compressed-tensors bitsandbytes", of(EIGHT), beyond={"activations": ActivationSpec()}),
    "int8 inputs with outliers": Case("bitsandbytes", of(EIGHT), beyond={"activations": ActivationSpec(outliers=6.0)}),
    "int8 inputs of int4": Case("", of(FOUR), beyond={"activations": ActivationSpec()}),
    "fp8 inputs of int8": Case("", of(EIGHT), beyond={"activations": ActivationSpec(kind="fp8_e4m3")}),
    "fp8 inputs": Case("compressed-tensors", of(FLOAT8), beyond={"activations": ActivationSpec(kind="fp8_e4m3")}),
    "nvfp4 inputs": Case(
        "compressed-tensors",
        of(QuantSpec(kind="nvfp4", group_size=16)),
        beyond={"activations": ActivationSpec(kind="nvfp4", scaling="static")},
    ),
    "mxfp4 inputs": Case(
        "compressed-tensors", of(QuantSpec(kind="mxfp4", group_size=32)), beyond={"activations": ActivationSpec(kind="mxfp4")}
    ),
    "int8 inputs of fp8": Case("", of(FLOAT8), beyond={"activations": ActivationSpec()}),
    "fp8 inputs of nvfp4": Case("", of(QuantSpec(kind="nvfp4", group_size=16)), beyond={"activations": ActivationSpec(kind="fp8_e4m3")}),
    "fp8 keys and values": Case("compressed-tensors", of(FOUR), beyond={"kv_cache": FP8}),
    "int8 keys and values": Case("", of(FOUR), beyond={"kv_cache": ActivationSpec(scaling="static")}),
    "fp8 keys and values by token": Case("", of(FOUR), beyond={"kv_cache": ActivationSpec(kind="fp8_e4m3")}),
    "qwen3": Case(f"compressed-tensors gptq gptq_v2 awq gguf safetensors {F32}", of(FOUR), "qwen3"),
    "qwen3 with biases": Case(
        f"compressed-tensors gptq gptq_v2 awq safetensors {F32}", of(FOUR), "qwen3", changes={"attention_bias": True}
    ),
    "llama with gelu": Case(f"compressed-tensors gptq gptq_v2 awq safetensors {F32}", of(FOUR), changes={"hidden_act": "gelu"}),
    "olmo2": Case(f"compressed-tensors gptq gptq_v2 awq safetensors {F32}", of(FOUR), "olmo2"),
}


def asked(case: Case) -> tuple[str, ...]:
    """The formats that a recipe with these options may name."""
    if "reader_version" in case.options:
        return ("compressed-tensors",)
    return ("safetensors",) if case.options else FORMATS


def folder_of(case: Case, build: Build) -> Path:
    """A quantized folder, as the stages leave it."""
    folder = build(case.family, scheme=case.scheme, **{**WIDE, **case.changes})
    if not case.beyond:
        return folder
    state = load_quant_state(folder)
    if cache := case.beyond.get("kv_cache"):
        attentions = tuple(dict.fromkeys(name.rpartition(".")[0] for name in state.modules if "attn" in name))
        scales = {f"{name}.{part}": torch.tensor(0.5) for name in attentions for part in "kv"} if cache.scaling == "static" else {}
        state = replace(state, cache=CacheState(spec=cache, attentions=attentions, scales=scales))
    activations = case.beyond.get("activations")
    stored = activations is not None and activations.scaling == "static"
    scales = {name: torch.tensor(0.5) for name in state.modules} if stored else {}
    state = replace(state, activations=activations, input_scales=scales)
    save_file(state.tensors(), folder / "quant/codes.safetensors")
    record = json.loads((folder / "decoct.json").read_text())
    seal_record(folder, record | {"quant": state.record(), "files": {}})
    return folder


def planned(case: Case, folder: Path, form: str) -> tuple[Any, list[str]]:
    remedies = RecipeRemedies(shape_of(load_config(folder), "a test"), case.scheme, (form,))
    stored = planned_model(remedies, **case.beyond, **case.options)
    return stored, format_problems(stored, remedies)


@pytest.mark.parametrize("name", CASES)
def test_a_format_is_refused_by_the_plan_and_by_its_exporter_alike(quantized_folder: Build, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    folder = folder_of(case, quantized_folder)
    for form in asked(case):
        stored, said = planned(case, folder, form)
        told = ""
        try:
            written = export_folder(folder, tmp_path / form, form, runtimes=False, **case.options)
            size = export_bytes(form, shape_of(load_config(folder), "a test"), case.scheme, **case.beyond, tokenizer=folder)
            # a GGUF file of so small a model is mostly header, and asymmetric 4-bit codes may take either of two blocks
            assert size == pytest.approx(written.bytes, rel=0.02 if form.startswith("gguf") else 0.002), form
        except UserError as error:
            told = str(error)
        assert bool(said) == bool(told), (form, said, told)
        assert bool(told) == (form not in case.holds.split()), (form, told)
        for refusal in refusals(form, stored):
            # the same reason; where values decide, in the words of the exporter that looked at them
            assert refusal.by_values or refusal.reason in told, (form, refusal.reason, told)


def test_every_format_is_held_and_refused_somewhere() -> None:
    for form in FORMATS:
        answers = {form in case.holds.split() for case in CASES.values() if form in asked(case)}
        assert answers == {True, False}, form


@pytest.mark.parametrize("name", ["int4", "a head", "q apart", "olmo2"])
def test_plan_and_exporter_describe_one_model_alike(quantized_folder: Build, name: str) -> None:
    case = CASES[name]
    folder = folder_of(case, quantized_folder)
    ours, theirs = planned(case, folder, "gguf")[0], check_limits.opened_model(open_source(folder))
    same = ("modules", "embedding", "tied", "activations", "kv_cache", "ffn")
    assert {key: getattr(ours, key) for key in same} == {key: getattr(theirs, key) for key in same}
    assert set(ours.tensors) == set(theirs.tensors)
    assert ours.config.to_dict().keys() == theirs.config.to_dict().keys()


def test_every_exporter_has_limits() -> None:
    assert LIMITS.keys() == EXPORTERS.keys()
    assert set(FORMATS) <= LIMITS.keys()
