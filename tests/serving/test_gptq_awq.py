"""GPTQ and AWQ exports in transformers with GPTQModel, whose packages need versions of their own: an interpreter that has them is named by
DECOCT_GPTQ_PYTHON (``make test-serving-gptq`` makes one)."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from decoct.qat.export.export import export_folder
from decoct.qat.rebuild import load_exported_model
from decoct.qat.runtimes import transformers_process
from decoct.qat.runtimes.agreement import MAX_PERPLEXITY_SHIFT, MIN_POSITIONS, compare_logits
from decoct.qat.runtimes.transformers_rules import rule_for
from decoct.qat.spec import QuantSpec

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif("DECOCT_GPTQ_PYTHON" not in os.environ, reason="DECOCT_GPTQ_PYTHON names no interpreter that has gptqmodel"),
]
Build = Callable[..., Path]
LLAMA: tuple[str, dict[str, Any]] = ("llama", {})
QWEN2: tuple[str, dict[str, Any]] = ("qwen2", {"tie_word_embeddings": True})
QWEN3: tuple[str, dict[str, Any]] = ("qwen3", {"tie_word_embeddings": True})
PRUNED: tuple[str, dict[str, Any]] = ("llama", {"pruned": True})
CASES: list[tuple[str, tuple[str, dict[str, Any]], dict[str, Any], tuple[str, ...]]] = [
    ("gptq", LLAMA, {"bits": 4, "group_size": 64}, ()),
    ("gptq", QWEN2, {"bits": 4, "group_size": "channel"}, ()),
    ("gptq", QWEN3, {"bits": 8, "group_size": 32}, ()),
    ("gptq", PRUNED, {"bits": 4, "group_size": 64}, ()),
    ("gptq", LLAMA, {"bits": 2, "group_size": 16}, ()),
    ("gptq", LLAMA, {"bits": 4, "group_size": 32}, ("*.down_proj",)),
    ("gptq_v2", LLAMA, {"bits": 4, "group_size": 16}, ()),
    ("gptq_v2", QWEN2, {"bits": 4, "group_size": 64, "symmetric": False}, ()),
    ("gptq_v2", QWEN3, {"bits": 4, "group_size": 32, "symmetric": False}, ()),
    ("gptq_v2", PRUNED, {"bits": 4, "group_size": 64}, ()),
    ("gptq_v2", LLAMA, {"bits": 8, "group_size": "channel", "symmetric": False}, ()),
    ("awq", LLAMA, {"bits": 4, "group_size": 64}, ()),
    ("awq", QWEN2, {"bits": 4, "group_size": 64, "symmetric": False}, ()),
    ("awq", QWEN3, {"bits": 4, "group_size": 64}, ("*.down_proj",)),
    ("awq", PRUNED, {"bits": 4, "group_size": 64}, ()),
]


def judged(folder: Path, text: Tensor, scratch: Path) -> Tensor:
    """Logits of plain transformers in the named interpreter, fp32; fails when a tensor was missing or left over."""
    files = {"tokens": scratch / "tokens.npy", "seen": scratch / "seen.npz", "result": scratch / "result.json"}
    np.save(files["tokens"], text.numpy())
    command = [os.environ["DECOCT_GPTQ_PYTHON"], "-P", "-W", "ignore", transformers_process.__file__, str(folder)]
    command += [part for name, file in files.items() for part in (f"--{name}", str(file))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(files["result"].read_text())
    assert "not_installed" not in result, result
    assert not result["loading"], result["loading"]
    return torch.from_numpy(np.load(files["seen"])["logits"])


@pytest.mark.parametrize(("form", "student", "spec", "skip"), CASES)
def test_transformers_computes_the_logits_of_the_fake_quant_model(
    quantized_folder: Build, known_text: Tensor, tmp_path: Path, form: str, student: Any, spec: Any, skip: Any
) -> None:
    source = quantized_folder(student[0], QuantSpec(**spec), skip=skip, **student[1])
    target = source.parent / form
    assert export_folder(source, target, form, runtimes=False).exact
    logits = judged(target, known_text, tmp_path)
    with torch.inference_mode():
        reference = torch.cat([load_exported_model(target)(input_ids=row[None], use_cache=False).logits for row in known_text])
    seen = compare_logits(reference, logits, known_text)
    print(form, student, spec, seen)
    rule = rule_for(target)
    assert seen.positions >= MIN_POSITIONS
    assert rule.exact == (form.startswith("gptq") and spec["bits"] <= 4 and spec.get("symmetric", True))
    assert seen.problem(None if rule.exact else MAX_PERPLEXITY_SHIFT["transformers"]) is None, seen
