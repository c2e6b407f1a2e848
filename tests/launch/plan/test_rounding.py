"""What the plan says of rounding after training: beside what it takes in a fresh process, and what is said where it cannot work."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from decoct.configs import recipe_from_dict
from decoct.launch.plan.make_plan import Plan, plan
from decoct.launch.plan.problems import problems
from decoct.launch.plan.rounding import RoundingPlan
from decoct.launch.plan.show import as_json, short_form
from decoct.trainer import rounding_settings


def planned(*settings: dict[str, Any], model: str = "meta-llama/Llama-3.1-8B", **machine: Any) -> tuple[Plan, list[RoundingPlan]]:
    data = {"builtin": "python-stdlib", "seq_length": 2048}
    stages = [{"quantize": {"name": f"s{index}", **one}} for index, one in enumerate(settings)]
    made = plan(recipe_from_dict({"name": "x", "student": {"path": model}, "data": data, "stages": stages}), **machine)
    return made, [stage.rounding for stage in made.stages if stage.rounding]


def test_gptq_takes_text_work_and_memory_and_rounding_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding_settings, "available_bytes", lambda: 10**12)
    gptq = {"method": "gptq"}
    made, (rtn, full, few, streamed) = planned(
        {}, gptq, {**gptq, "calibration_tokens": 65_536}, {**gptq, "stream": "always"}, gpus=1, gpu_memory=24 * 10**9
    )
    assert (rtn.tokens, rtn.flop, rtn.work_bytes) == (0, 0, 0)
    assert full.tokens == 262_144
    body = 6_979_321_856
    passes = 2 * 262_144 * body * (2 - 1 / 32)
    moments = 2 * 262_144 * 32 * (3 * 4096**2 + 14336**2)
    assert passes + moments < full.flop < 1.06 * (passes + moments)
    assert rtn.device_bytes < full.device_bytes == few.device_bytes == streamed.device_bytes < 10e9
    # hidden states, and what the attention's last linear reads; the FFN's is too much to keep
    assert full.host_bytes - few.host_bytes == 2 * 4 * 4096 * (262_144 - 65_536)
    assert streamed.host_bytes < 0.25 * full.host_bytes
    assert streamed.work_bytes == pytest.approx(5 * body, rel=0.01)
    alone, _ = planned(gptq, gpus=1, gpu_memory=24 * 10**9)
    assert made.disk_bytes - 4 * alone.disk_bytes == streamed.work_bytes
    assert "02-s1: gptq on 262k tokens, 1.2e+16 FLOP, 8.58 GB on a GPU, fits, about 53.7 GB of memory\n" in short_form(made)
    assert "layer by layer with 35.1 GB of work files" in short_form(made)
    assert as_json(made)["stages"][1]["rounding"]["tokens"] == 262_144


def test_ranges_take_text_and_a_pass_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding_settings, "available_bytes", lambda: 10**12)
    static, fp8 = {"kind": "int8", "scaling": "static"}, {"kind": "fp8_e4m3", "scaling": "static"}
    _, (rtn, dynamic, ranges, gptq, both) = planned(
        {}, {"kv_cache": {"kind": "int8"}}, {"activations": static}, {"method": "gptq"}, {"method": "gptq", "kv_cache": fp8}, gpus=1
    )
    assert dynamic == rtn
    assert ranges.tokens == gptq.tokens == both.tokens == 262_144
    once = 2 * 262_144 * 6_979_321_856
    assert ranges.flop == once * (2 - 1 / 32)
    assert both.flop - gptq.flop == pytest.approx(once, rel=1e-9)
    _, (small, served) = planned(*({"method": "gptq", "calibration_tokens": 16_384, **more} for more in ({}, {"kv_cache": fp8})), gpus=1)
    # what is kept spares a pass, but not where keys and values are rounded later
    assert served.flop - small.flop == pytest.approx(once / 16 * (2 - 1 / 32), rel=1e-9)
    assert small.host_bytes - rtn.host_bytes == 4 * 16_384 * (2 * 4096 + 14336)
    assert ranges.host_bytes - rtn.host_bytes == 4 * 4096 * 262_144
    assert both.host_bytes == gptq.host_bytes and both.device_bytes == gptq.device_bytes


def test_what_an_attention_wider_than_the_hidden_states_reads_is_counted(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    Qwen3Config(num_hidden_layers=2, vocab_size=512, tie_word_embeddings=True, **sizes).save_pretrained(tmp_path)
    _, (rtn, gptq) = planned({}, {"method": "gptq", "calibration_tokens": 16_384}, model=str(tmp_path), gpus=1)
    assert gptq.host_bytes - rtn.host_bytes == 4 * 16_384 * (1024 + 2048 + 3072)


def test_a_quantized_stage_that_starts_with_gptq_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding_settings, "available_bytes", lambda: 10**9)
    data = {"builtin": "python-stdlib", "seq_length": 2048}
    stages = [{"qat": {"name": name, "tokens": "1M", **more}} for name, more in (("a", {}), ("b", {"start": "mse"}), ("c", {"lora": 8}))]
    recipe = recipe_from_dict({"name": "x", "student": {"path": "meta-llama/Llama-3.1-8B"}, "data": data, "stages": stages})
    made = plan(recipe, gpus=1, gpu_memory=8 * 10**9)
    first, second, third = (stage.rounding for stage in made.stages)
    _, (gptq,) = planned({"method": "gptq", "stream": "never"}, gpus=1, gpu_memory=8 * 10**9)
    assert first == gptq and second is third is None
    assert "01-a: starts with gptq on 262k tokens" in short_form(made)
    assert any("01-a rounds the model before it trains" in found and "stages.01-a.start=mse" in found for found in problems(made))
    assert [value.value for value in made.stages[0].values if value.key.endswith("qat.start")] == ["gptq"]


def test_a_quantized_stage_behind_the_same_rounding_does_not_round_again() -> None:
    gptq, other = {"quantize": {"method": "gptq"}}, {"quantize": {"method": "gptq", "weights": {"bits": 3, "group_size": 128}}}
    pruned = {"prune": {"magnitude": {"keep": 0.5}, "tokens": "1M"}}
    data, found, starts = {"builtin": "python-stdlib", "seq_length": 2048}, [], []
    for before in ([gptq], [other], [pruned, gptq]):
        recipe = {"name": "x", "student": {"path": "meta-llama/Llama-3.1-8B"}, "data": data, "stages": [*before, {"qat": {"tokens": "1M"}}]}
        last = plan(recipe_from_dict(recipe)).stages[-1]
        found.append(last.rounding is not None)
        starts += [value.value for value in last.values if value.key.endswith(".qat.start")]
    assert (found, starts) == ([False, True, True], ["input", "gptq", "gptq"])


def test_calibration_reads_no_more_than_the_model_writes() -> None:
    recipe = recipe_from_dict(
        {
            "name": "x",
            "teacher": {"path": "HuggingFaceTB/SmolLM2-135M-Instruct"},
            "student": {"path": "HuggingFaceTB/SmolLM2-135M-Instruct"},
            "data": {"generate": {"tokens": "48k"}, "eval_tokens": "12k"},
            "stages": [{"quantize": {"method": "gptq", "weights": {"bits": 4, "group_size": 64}}}],
        }
    )
    rounding = plan(recipe).stages[0].rounding
    assert rounding is not None and rounding.tokens == 36_000


def test_a_gpu_that_is_too_small_for_a_layer_is_told() -> None:
    made, _ = planned({"method": "gptq"}, {}, gpus=1, gpu_memory=8 * 10**9)
    (problem,) = problems(made)
    assert problem.startswith("01-s0 works on one layer at a time, which takes 8.6 GB on a GPU, and 7.4 GB can be used")
    assert "does NOT fit" in short_form(made)


def test_what_is_skipped_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding_settings, "available_bytes", lambda: 10**12)
    _, (whole, part) = planned({"method": "gptq"}, {"method": "gptq", "skip": ["*.down_proj"]}, gpus=1)
    assert whole.device_bytes - part.device_bytes > 4 * 14336**2
    assert whole.fits is None


SCRIPT = """
import json, os, re, sys, threading, time
import torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from decoct.configs import recipe_from_dict
from decoct.launch.plan.make_plan import plan
from decoct.models.folder.loading import load_model
from decoct.qat.ptq import round_model
from decoct.trainer.data.windows import Windows
from decoct.trainer.stages.calibration import calibration_text
from decoct.trainer import rounding_settings
from decoct.trainer.rounding_settings import rounding_of

folder, *methods = sys.argv[1:]
torch.set_num_threads(1)
sizes = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=12, num_key_value_heads=12)
config = LlamaConfig(vocab_size=512, **sizes)
LlamaForCausalLM(config).save_pretrained(folder)
stages = {
    "rtn": {},
    "static": {"activations": {"scaling": "static"}, "kv_cache": {"scaling": "static"}, "calibration_tokens": 8192},
    "gptq": {"method": "gptq", "calibration_tokens": 8192},
}
# each in a process of its own, and nothing imported twice
for method in methods:
    if not os.fork():
        break
    os.wait()
else:
    sys.exit()
stage = {"quantize": stages[method]}
data = {"builtin": "python-stdlib", "seq_length": 256}
recipe = recipe_from_dict({"name": "x", "student": {"path": folder}, "data": data, "stages": [stage]})
rounding_settings.available_bytes = lambda: 10**12
predicted = plan(recipe).stages[0].rounding
settings = recipe.stages[0].settings

def anonymous():
    return int(re.findall(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[0]) * 1024

base, most = anonymous(), [0]
def watch():
    while True:
        most[0] = max(most[0], anonymous() - base)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
model = load_model(folder, dtype=torch.float32)
text = calibration_text(Windows(torch.randint(0, 512, (32, 256)).int().numpy()), 8192, 0)
round_model(model, settings.weights, rounding_of(settings), text=text, others=torch.bfloat16)
weights = sum(parameter.numel() for parameter in model.parameters())
# a file in one piece is not written here
print(json.dumps({"method": method, "measured": most[0], "predicted": predicted.host_bytes - min(4 * weights, 5 * 10**9)}))
"""


METHODS = ["rtn", "static", "gptq"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> "subprocess.CompletedProcess[str]":
    """A line of figures for each of ``METHODS``."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path_factory.mktemp("rounding") / "model"), *METHODS]
    # what glibc keeps of freed memory is not the model's
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what is anonymous")
@pytest.mark.parametrize("method", METHODS)
def test_prediction_is_within_a_quarter_of_the_memory_of_a_process(method: str, measured: "subprocess.CompletedProcess[str]") -> None:
    lines = [json.loads(line) for line in measured.stdout.splitlines() if line.startswith("{")]
    found = next((line for line in lines if line["method"] == method), None)
    assert found is not None, measured.stderr
    assert found["measured"] > 100e6
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.25), found
