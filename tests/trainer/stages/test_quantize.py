"""Stage quantize on a tiny trained model: what each method loses, what is recorded and said, files instead of memory, what is refused."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch

from decoct.models.common.errors import UserError
from decoct.models.families import decoder_linears
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import read_record, save_model_folder
from decoct.models.teachers import load_teacher
from decoct.qat.codes.state import load_quant_state
from decoct.qat.layers.quantized_model import fold, quantize_model
from decoct.qat.layers.save_folder import round_unquantized
from decoct.qat.ptq import CalibrationText, MethodName, RoundingMethod, ScaleChoice, round_model
from decoct.qat.spec import QuantSpec
from decoct.trainer import rounding_settings
from decoct.trainer.data.prepared_data import PreparedData
from decoct.trainer.evaluation.figures import evaluate_model
from decoct.trainer.rounding_settings import rounding_of, wants_streaming
from decoct.trainer.settings_quantization import QuantizeSettings
from decoct.trainer.stages import calibration, quantize
from decoct.trainer.stages.context import StageContext
from decoct.trainer.stages.quantize import finish

MakeContext = Callable[..., StageContext]
Prepared = Callable[..., PreparedData]
WEIGHTS = QuantSpec(bits=3, group_size=16)
GPTQ = QuantizeSettings(method="gptq", weights=WEIGHTS)


def said(context: StageContext) -> str:
    return cast(Any, context.run.console.file).getvalue()


def hashes(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "decoct.json")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def rounding(context: StageContext) -> dict[str, Any]:
    return read_record(context.model)["quant"]["rounding"]


def test_gptq_loses_less_than_searched_scales_and_those_less_than_rounding(make_context: MakeContext, trained_folder: Path) -> None:
    lost = {}
    for method in get_args(MethodName):
        context = make_context(f"01-{method}")
        finish(QuantizeSettings(method=method, weights=WEIGHTS), context, None)
        model = load_model(context.model, dtype=torch.float32)
        teacher = load_teacher(str(trained_folder), dtype=torch.float32, v_eff=context.run.v_eff)
        lost[method] = evaluate_model(model, teacher, context.run.data.evaluation).kl
        load_quant_state(context.model)
    assert lost["gptq"] < 0.6 * lost["mse"] < 0.6 * lost["rtn"]


def test_to_nearest_is_what_quantize_model_gives(make_context: MakeContext, trained_folder: Path) -> None:
    context = make_context("01-quantize")
    finish(QuantizeSettings(weights=WEIGHTS), context, None)
    model = load_model(trained_folder, dtype=torch.float32)
    state = quantize_model(model, WEIGHTS)
    assert load_quant_state(context.model).hash() == state.hash()
    fold(model, state)
    round_unquantized(model, state)
    written = load_model(context.model, dtype=torch.float32).state_dict()
    assert all(torch.equal(written[name], weight) for name, weight in model.state_dict().items())
    assert rounding(context) == {"method": "rtn", "relative_error": rounding(context)["relative_error"], "notes": []}


@pytest.mark.parametrize("settings", [QuantizeSettings(weights=WEIGHTS), GPTQ], ids=["rtn", "gptq"])
def test_from_files_is_as_from_memory_bit_for_bit(make_context: MakeContext, settings: QuantizeSettings) -> None:
    whole, streamed = make_context("01-whole"), make_context("01-streamed")
    skip = ("*.1.mlp.up_proj",)
    finish(replace(settings, stream="never", skip=skip), whole, None)
    finish(replace(settings, stream="always", skip=skip), streamed, None)
    assert hashes(streamed.model) == hashes(whole.model)
    assert rounding(streamed) == rounding(whole)
    assert "layer by layer" in said(streamed)
    assert "layer by layer" not in said(whole)
    assert [file.name for file in streamed.folder.iterdir()] == ["model"]


def test_what_is_not_rounded_is_calibrated_with_as_it_is_stored(make_context: MakeContext, trained_folder: Path, tmp_path: Path) -> None:
    """Embeddings and norms that bf16 does not hold are rounded before the model runs, not after."""
    model = load_model(trained_folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.003
    uneven = save_model_folder(tmp_path / "uneven", model, None, {}, dtype=torch.float32)
    context = make_context("01-quantize", input=str(uneven))
    finish(GPTQ, context, None)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "embed" in name:
            parameter.data = parameter.data.bfloat16().float()
    text = calibration.calibration_text(context.run.data.train, 262_144, 0)
    expected = round_model(model, WEIGHTS, RoundingMethod(method="gptq"), text=text).state
    assert load_quant_state(context.model).hash() == expected.hash()
    streamed = make_context("01-streamed", input=str(uneven))
    finish(replace(GPTQ, stream="always"), streamed, None)
    assert hashes(streamed.model) == hashes(context.model)


@pytest.mark.parametrize("stream", ["never", "always"])
def test_zeros_survive(make_context: MakeContext, trained_folder: Path, tmp_path: Path, words: Any, stream: Any) -> None:
    model = load_model(trained_folder, dtype=torch.float32)
    linears = decoder_linears(model)
    sparse = [name for name in linears if name.endswith(("up_proj", "q_proj"))]
    for name in sparse:
        weight = linears[name].weight.data
        weight[weight.abs() < weight.abs().median()] = 0
    folder = save_model_folder(tmp_path / "sparse", model, words, {"sparse": sparse}, dtype=torch.bfloat16)
    context = make_context("01-quantize", input=str(folder))
    finish(replace(GPTQ, stream=stream), context, None)
    codes = load_quant_state(context.model).codes
    assert all(not codes[name][linears[name].weight == 0].any() for name in sparse)
    assert read_record(context.model)["sparse"] == sparse
    free = next(name for name in codes if name.endswith("down_proj"))
    assert bool((codes[free] != 0).any())


def test_what_was_done_is_recorded_and_said(make_context: MakeContext, prepared: Prepared) -> None:
    context = make_context("01-quantize")
    finish(replace(GPTQ, calibration_tokens=2000, damping=0.02), context, None)
    record = rounding(context)
    assert {name: record[name] for name in ("method", "scale", "damping", "activation_order")} == {
        "method": "gptq",
        "scale": "fitted",
        "damping": 0.02,
        "activation_order": True,
    }
    assert record["calibration"]["tokens"] == 63 * 32 == 32 * record["calibration"]["windows"]
    text = calibration.calibration_text(prepared().train, 2000, 0)
    assert record["calibration"]["sha256"] == text.fingerprint()
    errors = record["relative_error"]
    assert len(errors) == 7
    assert all(0 < error["rounded"] < error["to_nearest"] < 1 and error["linears"] == 3 for error in errors.values())
    told = said(context)
    assert f"calibrates on 2,016 tokens in 63 windows (sha256 {text.fingerprint()[:12]})" in told
    assert "21 modules in 3 bits in groups of 16, by gptq" in told
    assert re.search(r"mlp\.down_proj +squared output error \d\.\d+e-\d\d of the whole, \d\.\d+e-\d\d to nearest", told)
    assert "10,080/10,080 layer tokens" in told


def test_trouble_is_said_shortly_and_recorded_in_full(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoct.qat.ptq.methods.factorize", lambda *_: None)
    context = make_context("01-quantize")
    finish(GPTQ, context, None)
    assert len(rounding(context)["notes"]) == 12
    assert said(context).count("no Cholesky factor") == 5
    assert "and 7 more notes in decoct.json" in said(context)


def test_the_text_decides_and_its_seed(make_context: MakeContext, prepared: Prepared, texts: Path) -> None:
    def codes(name: str, **changes: Any) -> tuple[str, str]:
        context = make_context(name, **changes)
        finish(replace(GPTQ, calibration_tokens=1024), context, None)
        return load_quant_state(context.model).hash(), rounding(context)["calibration"]["sha256"]

    one, again, seeded = codes("01-one"), codes("01-again"), codes("01-seeded", seed=1)
    other = codes("01-other", data=prepared(files=(str(texts / "0[0-7].txt"),)))
    assert one == again
    assert len({one[0], seeded[0], other[0]}) == len({one[1], seeded[1], other[1]}) == 3


def test_padding_is_masked(make_context: MakeContext, prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands behind a document's end changes nothing."""
    padded = prepared(packing=False)
    assert padded.train.lengths is not None
    assert int(padded.train.lengths.min()) < 32
    seen: list[CalibrationText] = []
    choose = calibration.calibration_text

    def dirty(*arguments: Any) -> CalibrationText:
        text = choose(*arguments)
        for batch in text.batches if seen else ():
            batch["input_ids"][batch["attention_mask"] == 0] = 7
        seen.append(text)
        return text

    monkeypatch.setattr(calibration, "calibration_text", dirty)
    states = []
    for name in ("01-clean", "01-dirty"):
        context = make_context(name, data=padded)
        finish(GPTQ, context, None)
        states.append(load_quant_state(context.model).hash())
    assert seen[0].tokens < sum(batch["input_ids"].numel() for batch in seen[0].batches)
    assert not torch.equal(seen[0].batches[-1]["input_ids"], seen[1].batches[-1]["input_ids"])
    assert states[0] == states[1]


def test_too_little_text_is_refused_before_anything_is_written(make_context: MakeContext) -> None:
    context = make_context("01-quantize")
    with pytest.raises(UserError, match=r"64 tokens are too few .*layers\.0\.mlp\.down_proj has 96 inputs.*raise calibration_tokens"):
        finish(replace(GPTQ, calibration_tokens=40), context, None)
    assert not list(context.folder.iterdir())
    finish(QuantizeSettings(method="mse", weighted=True, calibration_tokens=40, weights=WEIGHTS), context, None)


@pytest.mark.parametrize("stream", ["never", "always"])
def test_a_skip_pattern_that_matches_nothing_is_refused(make_context: MakeContext, stream: Any) -> None:
    context = make_context("01-quantize")
    with pytest.raises(UserError, match=r"skip: '\*\.wq' matches no linear layer"):
        finish(replace(GPTQ, skip=("*.wq",), stream=stream), context, None)
    assert not list(context.folder.iterdir())


def test_files_that_cannot_be_read_one_by_one(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "can_stream", lambda *_: False)
    context = make_context("01-quantize")
    with pytest.raises(UserError, match=r"01-quantize: stream: always, but the files of .* use stream: never"):
        finish(replace(GPTQ, stream="always"), context, None)
    monkeypatch.setattr(rounding_settings, "available_bytes", lambda: 1000)
    finish(GPTQ, context, None)
    assert "can only be read whole" in said(context)


def test_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for room, streams in ((8_999_999, True), (9_000_000, False), (None, False)):
        monkeypatch.setattr(rounding_settings, "available_bytes", lambda room=room: room)
        assert wants_streaming(GPTQ, 10**6) is streams
    assert wants_streaming(replace(GPTQ, stream="always"), 1)
    assert not wants_streaming(replace(GPTQ, stream="never"), 10**18)


def test_defaults_are_the_librarys() -> None:
    for method in get_args(MethodName):
        assert rounding_of(QuantizeSettings(method=method)) == RoundingMethod(method=method)
    hints = QuantizeSettings.__annotations__
    assert get_args(hints["method"]) == get_args(MethodName)
    assert set(get_args(ScaleChoice)) <= set(get_args(get_args(hints["scale"])[0]))
    assert QuantizeSettings().method == "rtn"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"damping": 0.1}, "damping=0.1 has no effect with method=rtn: it belongs to gptq; leave it out"),
        ({"method": "mse", "scale": "mse"}, "scale=mse has no effect with method=mse: it belongs to gptq"),
        ({"method": "mse", "activation_order": False}, "activation_order=false has no effect with method=mse"),
        ({"method": "gptq", "weighted": True}, "weighted=true has no effect with method=gptq: it belongs to mse"),
        ({"calibration_tokens": 1000}, "calibration_tokens=1000 has no effect with method=rtn: it belongs to gptq and mse"),
        ({"method": "mse", "calibration_tokens": 1000}, "calibration_tokens=1000 has no effect with method=mse unless weighted is true"),
        ({"method": "gptq", "damping": 1.5}, "damping=1.5 must be at least 0 and at most 1"),
    ],
)
def test_a_dial_that_would_do_nothing_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizeSettings(**given)


MEMORY_SCRIPT = """
import io, os, re, sys, threading, time
from pathlib import Path
import torch
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from decoct.models.folder import model_folder
from decoct.models.tokenizer.scratch_tokenizer import train_tokenizer
from decoct.qat.spec import QuantSpec
from decoct.trainer.data.windows import Windows
from decoct.trainer.settings_quantization import QuantizeSettings
from decoct.trainer.settings import TrainerSettings
from decoct.trainer.stages.context import StageContext
from decoct.trainer.stages.quantize import finish

def anonymous():
    return int(re.findall(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[0]) * 1024

class Run:
    teacher, seed = None, 0
    trainer, tokenizer, console = TrainerSettings(), train_tokenizer(iter(["a b c"] * 4), 258), Console(file=io.StringIO())
    def say(self, text): pass
    class data:
        packed, train = False, Windows(torch.randint(0, 258, (40, 32)).int().numpy())

place, source, *cases = sys.argv[1:]
torch.set_num_threads(1)
# each in a process of its own, and nothing imported twice
for case in cases:
    if not os.fork():
        break
    assert os.wait()[1] == 0, case
else:
    sys.exit()
folder = Path(place, case)
folder.mkdir()
context = StageContext(
    run=Run(), name="01-quantize", kind="quantize", folder=folder, key="key", input=source, input_revision=None, record={}
)

model_folder.MAX_SHARD = "30MB"
method, stream = case.split("-")
settings = QuantizeSettings(method=method, weights=QuantSpec(group_size=64), stream=stream, skip=("*.0.mlp.down_proj",))
base, seen, over = anonymous(), [0], threading.Event()
def watch():
    while not over.is_set():
        seen[0] = max(seen[0], anonymous() - base)
        time.sleep(0.002)
# a daemon: a script that fails must end
thread = threading.Thread(target=watch, daemon=True)
thread.start()
finish(settings, context, None)
over.set()
thread.join()
print(case, seen[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what is anonymous")
def test_memory_holds_a_part_of_a_model_that_is_streamed(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=258, hidden_size=512, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=8
    )
    source = save_model_folder(tmp_path / "source", LlamaForCausalLM(config), None, {}, dtype=torch.bfloat16)
    weights = 4 * 24 * (4 * 512 * 512 + 3 * 512 * 1024)
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path), str(source), "rtn-always", "gptq-always", "rtn-never"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rise = {case: int(seen) / weights for case, seen in (line.split() for line in done.stdout.splitlines()[-3:])}
    shards = json.loads((tmp_path / "rtn-always/model/model.safetensors.index.json").read_text())
    assert len(set(shards["weight_map"].values())) > 5
    load_quant_state(tmp_path / "gptq-always/model")
    assert rise["rtn-always"] < 0.4, rise
    assert rise["gptq-always"] < 0.6, rise
    assert rise["rtn-never"] > 1.2, rise
