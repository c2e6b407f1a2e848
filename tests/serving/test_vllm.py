"""Exports served by ``vllm serve`` on a CPU and asked over HTTP: every token of a text that the model knows.

vLLM has a venv of its own, whose interpreter DECOCT_VLLM_PYTHON names (``make test-serving-vllm`` makes one). Each case starts a server
once, which takes about half a minute.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decoct.models.folder.loading import load_model
from decoct.qat.export.export import export_folder
from decoct.qat.runtimes import reference, vllm_check
from decoct.qat.runtimes.reference import Reference
from decoct.qat.runtimes.vllm_check import PYTHON, check_vllm
from decoct.qat.spec import ActivationSpec, QuantSpec
from decoct.qat.verify.verify import verify_folder

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no interpreter that has vLLM"),
]
Build = Callable[..., Path]
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2, tied, qkv biases": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3, tied, q/k norms": ("qwen3", {"tie_word_embeddings": True}),
    "pruned llama": ("llama", {"pruned": True}),
}
INT4 = QuantSpec(bits=4, group_size=64)
ROWS = QuantSpec(bits=8, group_size="channel")
SCHEMES: dict[str, tuple[str, QuantSpec, dict[str, Any]]] = {
    "W4A16": ("compressed-tensors", INT4, {}),
    "W8A8": ("compressed-tensors", ROWS, {"activations": ActivationSpec()}),
    "GPTQ": ("gptq", INT4, {}),
    "AWQ": ("awq", INT4, {}),
}
OTHERS: dict[str, tuple[str, QuantSpec, dict[str, Any]]] = {
    "W8A8, stored asymmetric input scales": (
        "compressed-tensors",
        ROWS,
        {"activations": ActivationSpec(scaling="static", symmetric=False)},
    ),
    "W4A16 with zero points": ("compressed-tensors", QuantSpec(bits=4, group_size=64, symmetric=False), {}),
    "GPTQ, a scale per row, one matrix left out": ("gptq", QuantSpec(bits=4, group_size="channel"), {"skip": ["*.down_proj"]}),
}


def served(source: Path, form: str, text: Tensor) -> dict[str, Any]:
    target = source.parent / form
    assert export_folder(source, target, form, runtimes=False).exact
    assert verify_folder(target, source=source, runtimes=False).ok
    seen = check_vllm(Reference(target, text))
    print(form, seen)
    return seen


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("student", STUDENTS)
def test_vllm_predicts_what_was_trained(quantized_folder: Build, known_text: Tensor, student: str, scheme: str) -> None:
    model_type, options = STUDENTS[student]
    form, spec, more = SCHEMES[scheme]
    seen = served(quantized_folder(model_type, spec, **options, **more), form, known_text)
    assert seen["status"] == "agrees", seen
    assert seen["positions"] >= 2000
    assert seen["tokens_per_second"] > 0


@pytest.mark.parametrize("scheme", OTHERS)
def test_vllm_reads_the_other_forms(quantized_folder: Build, known_text: Tensor, scheme: str) -> None:
    form, spec, more = OTHERS[scheme]
    seen = served(quantized_folder("llama", spec, **more), form, known_text)
    assert seen["status"] == "agrees", seen


def test_plain_weights_are_served_alike(quantized_folder: Build, known_text: Tensor) -> None:
    seen = served(quantized_folder("llama", QuantSpec(bits=2, group_size=32)), "safetensors", known_text)
    assert seen["status"] == "agrees", seen
    assert seen["max_logprob_diff"] < 1e-3


def test_what_its_cpu_kernels_do_not_take_is_skipped_with_its_own_words(quantized_folder: Build, known_text: Tensor) -> None:
    seen = served(quantized_folder("llama", ROWS), "compressed-tensors", known_text)
    assert seen["status"] in ("skipped", "agrees"), seen
    assert seen["status"] == "agrees" or "Failed to find a kernel" in seen["reason"]


def test_a_wrong_model_is_seen(quantized_folder: Build, known_text: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison has teeth: two heads of one layer the wrong way round."""
    source = quantized_folder("llama", INT4)
    other: Any = load_model(source, dtype=torch.float32)
    weight = other.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.roll(32, dims=0)
    monkeypatch.setattr(reference, "load_exported_model", lambda path, inputs: other)
    monkeypatch.setattr(vllm_check, "_dtypes", lambda folder: ("bfloat16",))
    assert served(source, "compressed-tensors", known_text)["status"] == "differs"
