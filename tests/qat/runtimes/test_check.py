"""What plain transformers computes from an export, in a process of its own, against the fake-quant model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from decoct.models.common.errors import UserError
from decoct.qat.export.export import export_folder
from decoct.qat.rebuild import load_exported_model
from decoct.qat.runtimes import reference, transformers_check
from decoct.qat.runtimes import transformers_rules as runtime_rules
from decoct.qat.runtimes.check import check_runtimes

Build = Callable[..., Path]
TOKENS = torch.randint(0, 258, (2, 12), generator=torch.Generator().manual_seed(0))


def test_a_runtime_that_is_not_installed_is_said_to_be(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_rules.importlib.util, "find_spec", lambda name: None)
    seen = check_runtimes(exported)["transformers"]
    assert (seen["status"], seen["top1"]) == ("not installed", None)
    assert "compressed-tensors" in seen["reason"]


def installed() -> None:
    pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")


def test_too_little_memory_skips(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed()
    monkeypatch.setattr(reference, "available_bytes", lambda: 1000)
    seen = check_runtimes(exported)["transformers"]
    assert seen["status"] == "skipped"
    assert "1,000 are free" in seen["reason"]


def test_tokens_must_fit_the_vocabulary(exported: Path) -> None:
    installed()
    with pytest.raises(UserError, match="vocabulary of 258"):
        check_runtimes(exported, tokens=torch.full((1, 4), 258))
    with pytest.raises(UserError, match="int64"):
        check_runtimes(exported, tokens=torch.zeros(1, 4))


@pytest.mark.slow
@pytest.mark.usefixtures("warm_judges")
@pytest.mark.parametrize(
    ("model_type", "bits", "group_size", "skip", "tied"),
    [
        ("llama", 4, 16, (), True),
        ("llama", 8, "channel", (), False),
        ("qwen2", 4, "channel", ("*.down_proj",), True),
        ("qwen3", 4, 16, (), False),
        ("mistral", 2, 16, (), False),
    ],
)
def test_plain_transformers_computes_the_same_logits(
    quantized_folder: Build, tmp_path: Path, model_type: str, bits: int, group_size: Any, skip: tuple[str, ...], tied: bool
) -> None:
    installed()
    source = quantized_folder(model_type, bits=bits, group_size=group_size, skip=skip, tie_word_embeddings=tied)
    export_folder(source, tmp_path / "export", "compressed-tensors", runtimes=False)
    seen = check_runtimes(tmp_path / "export", tokens=TOKENS)["transformers"]
    assert (seen["status"], seen["top1"], seen["reason"]) == ("agrees", 1.0, None)
    assert seen["max_logprob_diff"] <= 1e-5
    assert seen["perplexity"] > 1
    assert "compressed-tensors" in seen["version"]
    assert seen["tokens_per_second"] > 0
    assert 10**8 < seen["peak_bytes"] < 10**10


@pytest.mark.slow
@pytest.mark.usefixtures("warm_judges")
def test_another_model_differs(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed()

    def other(path: Path, *, inputs: str) -> PreTrainedModel:
        model = load_exported_model(path)
        model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] += 0.5
        return model

    monkeypatch.setattr(reference, "load_exported_model", other)
    seen = check_runtimes(exported)["transformers"]
    assert seen["status"] == "differs"
    assert "logits differ by" in seen["reason"]


def test_names_that_transformers_did_not_take_are_another_model(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed()
    loaded = {"loading": {"missing_keys": ["lm_head.weight"]}, "version": "transformers 9"}
    monkeypatch.setattr(transformers_check, "run_judge", lambda *arguments: (loaded, {}))
    seen = check_runtimes(exported)["transformers"]
    assert seen["status"] == "differs"
    assert "missing keys: lm_head.weight (1 in all)" in seen["reason"]


@pytest.mark.slow
def test_a_runtime_that_breaks_tells_why(exported: Path) -> None:
    installed()
    config = json.loads((exported / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["unknown"] = 1
    (exported / "config.json").write_text(json.dumps(config))
    (exported / "decoct.json").unlink()  # an export by others
    seen = check_runtimes(exported)["transformers"]
    assert seen["status"] == "skipped"
    assert "it does not load the export: exit code 1: " in seen["reason"]
    assert "unknown" in seen["reason"], "its own words name the field"
