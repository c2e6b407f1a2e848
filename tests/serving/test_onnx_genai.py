"""GPTQ and AWQ exports in ONNX Runtime, through the model builder of onnxruntime-genai: an interpreter that has both is named by
DECOCT_ONNX_PYTHON (``make test-serving-onnx`` makes one)."""

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decoct.qat.export.export import export_folder
from decoct.qat.export.format_readers import ONNX_OPTIONS, reading
from decoct.qat.rebuild import load_exported_model
from decoct.qat.runtimes.agreement import MAX_PERPLEXITY_SHIFT, MIN_POSITIONS, compare_logits
from decoct.qat.spec import QuantSpec

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif("DECOCT_ONNX_PYTHON" not in os.environ, reason="DECOCT_ONNX_PYTHON names no interpreter that has onnxruntime-genai"),
]


def judged(folder: Path, text: Tensor, scratch: Path, options: Sequence[str]) -> Tensor:
    """Logits of ONNX Runtime, fp32."""
    tokens, logits = scratch / "tokens", scratch / "logits"
    save_file({"tokens": text}, tokens)
    judge = str(Path(__file__).with_name("onnx_judge.py"))
    command = [os.environ["DECOCT_ONNX_PYTHON"], "-P", judge, str(folder), str(scratch / "onnx"), str(tokens), str(logits), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(logits)["logits"]


@pytest.mark.parametrize(
    ("form", "family", "spec"),
    [
        ("gptq", "llama", {"bits": 4, "group_size": 32}),
        ("gptq", "qwen2", {"bits": 4, "group_size": 64}),
        ("awq", "llama", {"bits": 4, "group_size": 64}),
        ("gptq_v2", "llama", {"bits": 4, "group_size": 64}),
    ],
)
def test_the_builders_graph_computes_the_fake_quant_model_or_is_known_to_misread_it(
    quantized_folder: Callable[..., Path], known_text: Tensor, tmp_path: Path, form: str, family: str, spec: dict[str, Any]
) -> None:
    source = quantized_folder(family, QuantSpec(**spec), **({"tie_word_embeddings": True} if family == "qwen2" else {}))
    target = tmp_path / form
    assert export_folder(source, target, form, runtimes=False).exact
    logits = judged(target, known_text, tmp_path, ONNX_OPTIONS.split())
    with torch.inference_mode():
        reference = torch.cat([load_exported_model(target)(input_ids=row[None], use_cache=False).logits for row in known_text])
    seen = compare_logits(reference, logits, known_text)
    print(form, family, spec, seen)
    assert seen.positions >= MIN_POSITIONS
    known = reading(form, "ONNX Runtime")
    assert known is not None
    if known.outcome == "reads":
        assert seen.top1 == 1.0 and seen.max_logprob_diff < 1e-3, seen
    else:
        assert seen.problem(MAX_PERPLEXITY_SHIFT["transformers"]), seen
