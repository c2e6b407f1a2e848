"""Exports in plain transformers, in a fresh process: every kind of compressed-tensors file and plain weights, of every family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from decoct.qat.export.export import export_folder
from decoct.qat.rebuild import load_exported_model
from decoct.qat.runtimes import reference
from decoct.qat.runtimes.agreement import MIN_POSITIONS, TOLERANCE
from decoct.qat.runtimes.check import check_runtimes
from decoct.qat.scheme import QuantScheme, SpecChange
from decoct.qat.spec import ActivationSpec, QuantSpec
from decoct.qat.verify.verify import verify_folder

pytestmark = [pytest.mark.serving, pytest.mark.usefixtures("compressed_tensors")]

Build = Callable[..., Path]
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2, tied, qkv biases": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3, tied, q/k norms": ("qwen3", {"tie_word_embeddings": True}),
    "pruned llama": ("llama", {"pruned": True}),
}
INT4 = QuantSpec(bits=4, group_size=64)
ROWS = QuantSpec(bits=8, group_size="channel")
FLOAT8 = QuantSpec(kind="fp8_e4m3", bits=8, group_size="channel")
MIXED = QuantScheme(weights=INT4, overrides={"*.down_proj": SpecChange(bits=8, group_size="channel")})
STATIC = ActivationSpec(scaling="static")
FP8 = ActivationSpec(kind="fp8_e4m3", scaling="static")
SCHEMES: dict[str, tuple[str, QuantSpec | QuantScheme, dict[str, Any]]] = {
    "int4": ("compressed-tensors", INT4, {}),
    "int8": ("compressed-tensors", ROWS, {}),
    "mixed": ("compressed-tensors", MIXED, {}),
    "asymmetric int4": ("compressed-tensors", QuantSpec(bits=4, group_size=64, symmetric=False), {}),
    "asymmetric int8": ("compressed-tensors", QuantSpec(bits=8, group_size="channel", symmetric=False), {}),
    "W8A8 dynamic": ("compressed-tensors", ROWS, {"activations": ActivationSpec()}),
    "W8A8 static, fp8 keys and values": ("compressed-tensors", ROWS, {"activations": STATIC, "kv_cache": FP8}),
    "mixed, fp8 keys and values": ("compressed-tensors", MIXED, {"kv_cache": FP8}),
    "fp8": ("compressed-tensors", FLOAT8, {}),
    "fp8 W8A8 dynamic": ("compressed-tensors", FLOAT8, {"activations": ActivationSpec(kind="fp8_e4m3")}),
    "fp8 W8A8 static": ("compressed-tensors", FLOAT8, {"activations": FP8, "kv_cache": FP8}),
    "mxfp4": ("compressed-tensors", QuantSpec(kind="mxfp4", group_size=32), {}),
    "nvfp4": ("compressed-tensors", QuantSpec(kind="nvfp4", group_size=16), {}),
    "plain": ("safetensors", QuantSpec(bits=2, group_size=32), {}),
}


@pytest.fixture(scope="session")
def compressed_tensors() -> None:
    pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")


def exported(source: Path, form: str) -> Path:
    target = source.parent / form
    assert export_folder(source, target, form, runtimes=False).exact
    assert verify_folder(target, source=source, runtimes=False).ok
    return target


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("student", STUDENTS)
def test_transformers_computes_what_was_trained(quantized_folder: Build, known_text: Tensor, student: str, scheme: str) -> None:
    model_type, options = STUDENTS[student]
    form, spec, more = SCHEMES[scheme]
    seen = check_runtimes(exported(quantized_folder(model_type, spec, **options, **more), form), tokens=known_text)["transformers"]
    print(student, scheme, seen)
    assert seen["status"] == "agrees", seen
    assert seen["positions"] >= MIN_POSITIONS
    # zero points and nvfp4 are unpacked in bf16; everything else must be equal in fp32
    rounded = "asymmetric" in scheme or scheme == "nvfp4"
    assert (seen.get("arithmetic") == "own") is rounded
    if not rounded:
        assert seen["top1"] == 1.0


def test_a_wrong_model_is_seen(quantized_folder: Build, known_text: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison has teeth: one weight that is off by a little."""

    def other(path: Path, *, inputs: str) -> Any:
        model: Any = load_exported_model(path)
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 200 * TOLERANCE
        return model

    target = exported(quantized_folder("llama", INT4), "compressed-tensors")
    monkeypatch.setattr(reference, "load_exported_model", other)
    assert check_runtimes(target, tokens=known_text)["transformers"]["status"] == "differs"
