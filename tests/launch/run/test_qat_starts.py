"""Stage qat in real runs: where it starts, what trains, and that what it writes can be packed exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from decoct.models.folder.loading import load_model
from decoct.qat.codes.state import load_quant_state
from decoct.qat.spec import ActivationSpec
from decoct.trainer.evaluation.model_row import open_for_measuring

Run = Callable[..., Any]


def recipe(tiny: dict[str, Any], *, export: bool = False, **qat: Any) -> dict[str, Any]:
    text = {"calibration_tokens": 2048} if qat.get("start") == "gptq" else {}
    stages: list[dict[str, Any]] = [{"qat": {"steps": 8, "weights": {"bits": 2, "group_size": 16}, "teacher": "recipe", **text, **qat}}]
    if export:
        stages.append({"export": {}})
    return {**tiny, "student": {"keep": {"layers": 3}}, "stages": stages}


def done(result: Any) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


VARIANTS: dict[str, dict[str, Any]] = {
    "gptq": {"start": "gptq"},
    "scales": {"train": "scales"},
    "scales-gptq": {"train": "scales", "start": "gptq"},
    "lora": {"lora": 4, "start": "mse"},
    "schedule": {"delay": 0.25, "anneal_from": 6, "anneal": 0.25, "freeze_scales": 0.25},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_way_of_training_ends_in_codes_that_are_packed_exactly(tiny: dict[str, Any], run: Run, tmp_path: Path, name: str) -> None:
    done(run(recipe(tiny, export=True, **{**VARIANTS[name], "weights": {"bits": 4, "group_size": 16}})))
    folder = tmp_path / "runs/tiny/01-qat"
    state = load_quant_state(folder / "model")
    assert state.modules
    assert not (folder / "start").exists()
    report = json.loads((tmp_path / "runs/tiny/report.json").read_text())
    assert report["exports"][0]["exact"]


def _lines(folder: Path, name: str) -> list[str]:
    return (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_gptq_and_searched_scales_start_nearer_to_the_teacher(tiny: dict[str, Any], run: Run, tmp_path: Path) -> None:
    first: dict[str, float] = {}
    for start in ("rtn", "mse", "gptq"):
        given = recipe(tiny, start=start, weights={"bits": 2, "group_size": 16}, learning_rate=1e-7)
        done(run(given, f"name={start}"))
        lines = [json.loads(line) for line in (tmp_path / f"runs/{start}/metrics.jsonl").read_text().splitlines()]
        first[start] = next(line["kl"] for line in lines if line["stage"] == "01-qat" and line["step"] == 1)
    assert first["gptq"] < first["mse"] < first["rtn"]


@pytest.mark.slow
def test_scales_alone_leave_every_other_weight_as_it_was(tiny: dict[str, Any], run: Run, tmp_path: Path) -> None:
    done(run(recipe(tiny, train="scales", steps=60, scale_learning_rate=1e-3)))
    before = load_file(tmp_path / "runs/tiny/00-student/model/model.safetensors")
    folder = tmp_path / "runs/tiny/01-qat/model"
    after, state = load_file(folder / "model.safetensors"), load_quant_state(folder)
    quantized = {f"{name}.weight" for name in state.modules}
    for name in before.keys() - quantized:
        assert torch.equal(after[name], before[name].to(torch.bfloat16).float()), name
    seen = json.loads((tmp_path / "runs/tiny/report.json").read_text())
    rounded = {**recipe(tiny), "name": "rtn", "stages": [{"quantize": {"weights": {"bits": 2, "group_size": 16}}}]}
    done(run(rounded))
    plain = json.loads((tmp_path / "runs/rtn/report.json").read_text())
    assert seen["stages"][-1]["eval"]["kl"] < 0.9 * plain["stages"][-1]["eval"]["kl"]


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["dynamic", "static"])
def test_inputs_are_rounded_in_training_and_when_the_folder_is_measured(
    tiny: dict[str, Any], run: Run, tmp_path: Path, scaling: str
) -> None:
    weights = {"bits": 8, "group_size": "channel"}
    done(run(recipe(tiny, weights=weights, activations={"kind": "int8", "scaling": scaling})))
    folder = tmp_path / "runs/tiny/01-qat/model"
    state = load_quant_state(folder)
    assert state.activations == ActivationSpec(scaling=scaling)  # pyright: ignore[reportArgumentType]
    assert set(state.input_scales) == (set(state.modules) if scaling == "static" else set())
    stored, plain = open_for_measuring(str(folder)), load_model(folder, dtype=torch.float32)
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        difference = (stored(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max()
    assert 1e-6 < float(difference) < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("start", ["mse", "gptq"])
def test_keys_and_values_are_rounded_from_training_to_the_export(tiny: dict[str, Any], run: Run, tmp_path: Path, start: str) -> None:
    fp8 = {"kind": "fp8_e4m3", "scaling": "static"}
    said = done(run(recipe(tiny, export=True, start=start, weights={"bits": 4, "group_size": 16}, kv_cache=fp8)))
    assert "keys and values in fp8_e4m3, static" in said
    folder, exported = tmp_path / "runs/tiny/01-qat/model", tmp_path / "runs/tiny/02-export/compressed-tensors"
    state = load_quant_state(folder)
    assert state.cache is not None and len(state.cache.scales) == 2 * 3
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        plain, stored, rebuilt = (
            model(input_ids=ids, use_cache=False).logits
            for model in (load_model(folder, dtype=torch.float32), open_for_measuring(str(folder)), open_for_measuring(str(exported)))
        )
    assert torch.equal(stored, rebuilt)
    assert float((stored - plain).abs().max()) > 1e-3
    report = json.loads((tmp_path / "runs/tiny/report.json").read_text())
    (export,) = report["exports"]
    assert export["exact"] and export["eval"]["kl"] == report["stages"][-2]["eval"]["kl"]


@pytest.mark.slow
def test_two_sharded_ranks_find_the_ranges_of_one(tiny: dict[str, Any], run: Run, tmp_path: Path) -> None:
    """FSDP2 from shapes alone: hooks are there before weights are."""
    static = {"scaling": "static"}
    given = recipe(tiny, weights={"bits": 8, "group_size": "channel"}, activations=static, kv_cache={"kind": "fp8_e4m3", **static})
    done(run(given, "name=one"))
    done(run(given, "name=two", "trainer.strategy=fsdp2", ranks=2))
    one, two = (load_quant_state(tmp_path / f"runs/{name}/01-qat/model") for name in ("one", "two"))
    assert one.cache is not None and two.cache is not None
    for found, expected in ((two.cache.scales, one.cache.scales), (two.input_scales, one.input_scales)):
        assert found.keys() == expected.keys() and len(found) > 5
        assert all(torch.allclose(found[name], expected[name], rtol=0.02) for name in found)


@pytest.mark.slow
def test_w8a8_is_made_without_training(tiny: dict[str, Any], run: Run, tmp_path: Path) -> None:
    """Inputs by ranges of the calibration text, keys and values too, packed for servers; dynamic keys and values are refused in words."""
    static = {"kind": "int8", "scaling": "static"}
    stage = {"weights": {"bits": 8, "group_size": "channel"}, "activations": static, "calibration_tokens": 2048}
    given = {**tiny, "student": {"keep": {"layers": 3}}, "stages": [{"quantize": stage}, {"export": {}}]}
    done(run(given, "stages.0.kv_cache.kind=fp8_e4m3", "stages.0.kv_cache.scaling=static"))
    report = json.loads((tmp_path / "runs/tiny/report.json").read_text())
    assert report["exports"][0]["exact"]
    refused = run(given, "name=dynamic", "stages.0.kv_cache.kind=fp8_e4m3")
    assert refused.returncode == 2
    assert "kv_cache" in refused.stderr + refused.stdout and "scaling" in refused.stderr + refused.stdout


@pytest.mark.slow
def test_two_sharded_ranks_start_from_the_same_codes_as_one(tiny: dict[str, Any], run: Run, tmp_path: Path) -> None:
    done(run(recipe(tiny, start="gptq"), "name=one"))
    done(run(recipe(tiny, start="gptq"), "name=two", "trainer.strategy=fsdp2", ranks=2))
    one, two = (
        [line["loss"] for line in map(json.loads, _lines(tmp_path, name)) if line["stage"] == "01-qat" and line["step"] > 0]
        for name in ("one", "two")
    )
    assert one[0] == pytest.approx(two[0], rel=1e-4)
    assert one[-1] == pytest.approx(two[-1], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq", "scales", "lora"])
def test_pruned_weights_stay_zero(tiny: dict[str, Any], run: Run, tmp_path: Path, name: str) -> None:
    given = recipe(tiny, **VARIANTS[name])
    given["stages"].insert(0, {"prune": {"magnitude": {"keep": 0.6}}})
    done(run(given))
    before = load_file(tmp_path / "runs/tiny/01-prune/model/model.safetensors")
    state = load_quant_state(tmp_path / "runs/tiny/02-qat/model")
    for module in state.modules:
        pruned = before[f"{module}.weight"] == 0
        assert pruned.float().mean() > 0.3
        assert not state.codes[module][pruned].any(), module


@pytest.mark.slow
def test_scales_alone_refuse_to_be_spread(tiny: dict[str, Any], run: Run) -> None:
    result = run(recipe(tiny, train="scales"), "trainer.devices=2", "trainer.strategy=fsdp2")
    assert result.returncode == 2
    assert "train: scales keeps codes of one byte a weight whole on every rank" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
