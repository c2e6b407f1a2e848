"""GPTQ and AWQ exports in transformers with GPTQModel, whose packages need versions of their own: an interpreter that has them is named by
DECOCT_GPTQ_PYTHON (``pip install transformers optimum accelerate gptqmodel`` in a venv; docs/serving.md)."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoct.qat import runtime_check
from decoct.qat.export.source import ExportSource
from decoct.qat.rebuild import load_exported_model
from decoct.qat.runtime_rules import rule_for
from decoct.qat.runtimes import compare_logits
from decoct.qat.spec import QuantSpec

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif("DECOCT_GPTQ_PYTHON" not in os.environ, reason="DECOCT_GPTQ_PYTHON names no interpreter that has gptqmodel"),
]
Make = Callable[..., ExportSource]
Export = Callable[..., Path]
TOKENS = torch.randint(0, 258, (4, 32), generator=torch.Generator().manual_seed(0))
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def judged(folder: Path, scratch: Path) -> torch.Tensor:
    """Logits of plain transformers in the named interpreter, fp32; fails when a tensor was missing or left over."""
    files = {name: scratch / name for name in ("tokens", "logits", "result")}
    save_file({"tokens": TOKENS}, files["tokens"])
    command = [os.environ["DECOCT_GPTQ_PYTHON"], "-P", "-W", "ignore", runtime_check.__file__, str(folder)]
    command += [part for name, file in files.items() for part in (f"--{name}", str(file))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(files["result"].read_text())
    assert "not_installed" not in result, result
    assert not result["loading"], result["loading"]
    return load_file(files["logits"])["logits"]


CASES: list[tuple[str, str, dict[str, Any], tuple[str, ...], dict[str, Any]]] = [
    ("gptq", "llama", {"bits": 4, "group_size": 32}, (), {"tie_word_embeddings": True}),
    ("gptq", "qwen2", {"bits": 4, "group_size": "channel"}, (), {}),
    ("gptq", "qwen3", {"bits": 8, "group_size": 16}, (), {}),
    ("gptq", "llama", {"bits": 2, "group_size": 16}, (), {}),
    ("gptq", "llama", {"bits": 4, "group_size": 16}, ("*.down_proj",), {}),
    ("gptq_v2", "llama", {"bits": 4, "group_size": 16}, (), {}),
    ("gptq_v2", "qwen2", {"bits": 4, "group_size": 16, "symmetric": False}, (), {}),
    ("gptq_v2", "llama", {"bits": 8, "group_size": "channel", "symmetric": False}, (), {}),
    ("awq", "llama", {"bits": 4, "group_size": 32}, (), {"tie_word_embeddings": True}),
    ("awq", "qwen2", {"bits": 4, "group_size": 16, "symmetric": False}, (), {}),
    ("awq", "qwen3", {"bits": 4, "group_size": 32}, ("*.down_proj",), {}),
]


@pytest.mark.parametrize(("form", "model_type", "spec", "skip", "config"), CASES)
def test_transformers_computes_the_logits_of_the_fake_quant_model(
    lattice_source: Make, export_source: Export, tmp_path: Path, form: str, model_type: str, spec: Any, skip: Any, config: Any
) -> None:
    target = export_source(lattice_source(QuantSpec(**spec), model_type=model_type, skip=skip, **WIDE, **config), form)
    (tmp_path / "scratch").mkdir()
    logits = judged(target, tmp_path / "scratch")
    with torch.inference_mode():
        reference = torch.cat([load_exported_model(target)(input_ids=row[None], use_cache=False).logits for row in TOKENS])
    seen = compare_logits(reference, logits, TOKENS)
    rule = rule_for(target)
    assert rule.exact == (form == "gptq" and spec["bits"] <= 4) or form == "gptq_v2"
    assert seen.top1 == 1.0
    assert seen.agrees if rule.exact else seen.near, (seen.max_logit_diff, seen.largest_logit, seen.top1)
