"""Real runs with lattices that differ from module to module, rounded embeddings and other kinds than int."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.models.folder.loading import load_model
from decoct.qat.codes.state import load_quant_state
from decoct.trainer.evaluation.model_row import open_for_measuring

Run = Callable[..., Any]


def recipe(tiny: dict[str, Any], *stages: dict[str, Any]) -> dict[str, Any]:
    return {**tiny, "student": {"keep": {"layers": 3}}, "stages": list(stages)}


def done(result: Any) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def report(place: Path) -> dict[str, Any]:
    return json.loads((place / "runs/tiny/report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("start", ["mse", "gptq"])
def test_zero_points_and_overrides_are_trained_and_packed_exactly(tiny: dict[str, Any], run: Run, tmp_path: Path, start: str) -> None:
    text = {"calibration_tokens": 2048} if start == "gptq" else {}
    qat = {
        "steps": 8,
        "teacher": "recipe",
        "start": start,
        "weights": {"bits": 4, "group_size": 16, "symmetric": False},
        "overrides": {"*.down_proj": {"bits": 8, "symmetric": True}, "*.0.self_attn.o_proj": {"group_size": "channel"}},
        **text,
    }
    out = done(run(recipe(tiny, {"qat": qat}, {"export": {"formats": ["compressed-tensors", "gptq_v2"]}})))
    assert "17 modules in 4 bits in groups of 16, with zero points, 3 modules in 8 bits in groups of 16, 1 modules in 4 bits with" in out
    state = load_quant_state(tmp_path / "runs/tiny/01-qat/model")
    assert state.spec_of("model.layers.2.mlp.down_proj").bits == 8
    assert len(state.zero_points) == 18
    assert [export["exact"] for export in report(tmp_path)["exports"]] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["qat", "quantize", "gptq"])
def test_embedding_and_head_are_rounded_when_asked_for(tiny: dict[str, Any], run: Run, tmp_path: Path, stage: str) -> None:
    lattice = {"weights": {"bits": 4, "group_size": 32}, "embedding": {"bits": 8}}
    settings: dict[str, Any] = {
        "qat": {"qat": {"steps": 4, "teacher": "recipe", **lattice}},
        "quantize": {"quantize": lattice},
        "gptq": {"quantize": {"method": "gptq", "calibration_tokens": 2048, **lattice}},
    }[stage]
    done(run(recipe(tiny, settings, {"export": {"formats": ["gguf"]}})))
    folder = tmp_path / f"runs/tiny/01-{next(iter(settings))}/model"
    state = load_quant_state(folder)
    assert state.spec_of("model.embed_tokens").bits == 8
    model = load_model(folder, dtype=torch.float32)
    table = model.get_parameter("model.embed_tokens.weight")
    assert torch.equal(table, state.dequantized("model.embed_tokens"))
    if model.config.tie_word_embeddings:
        assert model.get_parameter("lm_head.weight") is table
    assert report(tmp_path)["exports"][0]["exact"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "mxfp4"])
def test_other_kinds_train_and_are_measured(tiny: dict[str, Any], run: Run, tmp_path: Path, kind: str) -> None:
    weights = {"kind": kind, "bits": 4, "group_size": 32}
    done(run(recipe(tiny, {"qat": {"steps": 4, "teacher": "recipe", "weights": weights}}, {"evaluate": {}})))
    folder = tmp_path / "runs/tiny/01-qat/model"
    state = load_quant_state(folder)
    assert state.spec.kind == kind
    assert all(codes.dtype == torch.uint8 for codes in state.codes.values())
    model = open_for_measuring(str(folder))
    name = state.modules[0]
    assert torch.equal(model.get_parameter(f"{name}.weight"), state.dequantized(name))
    told = report(tmp_path)
    assert told["stages"][-1]["eval"]["kl"] > 0
    assert told["baselines"][0]["name"] == f"teacher rounded to {kind}"


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"qat": {"steps": 1, "overrides": {"*.gate": {"bits": 8}}}}, "stages.0.qat.overrides: '*.gate' matches no linear layer"),
        ({"qat": {"steps": 1, "overrides": {"*.down_proj": {"bit": 8}}}}, "overrides.*.down_proj.bit: unknown key, did you mean 'bits'?"),
        (
            {"qat": {"steps": 1, "overrides": {"*.down_proj": {"bits": 9}}}},
            "overrides.*.down_proj.bits: 9 is out of range; it must be at least 2",
        ),
        ({"qat": {"steps": 1, "train": "scales", "embedding": {"bits": 8}}}, "embedding has no effect with train=scales"),
        ({"qat": {"steps": 1, "weights": {"kind": "nf4", "group_size": 16}, "start": "gptq"}}, "start needs integer codes"),
        ({"quantize": {"skip": ["*.q_prj"]}}, "stages.0.quantize.skip: '*.q_prj' matches no linear layer"),
        ({"quantize": {"skip": ["*"]}}, "there is nothing to quantize"),
        (
            {"quantize": {"weights": {"group_size": 16}, "method": "gptq", "calibration_tokens": 10}},
            "calibration_tokens: 32 tokens are too few for a matrix with 64 inputs",
        ),
        (
            {"quantize": {"weights": {"kind": "nf4", "group_size": 16}, "method": "gptq", "scale": "fitted"}},
            "kind=nf4 has few scales to choose from: use scale=mse",
        ),
    ],
)
def test_what_cannot_be_done_is_one_message(tiny: dict[str, Any], run: Run, stage: dict[str, Any], message: str) -> None:
    result = run(recipe(tiny, stage))
    assert result.returncode == 2
    assert "teacher" not in result.stdout, "it is said before anything is trained"
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
