"""Stage quantize with a transform: the function before rounding, what is lost, what is recorded, files, exports, and what is refused."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from decoct.models.common.errors import UserError
from decoct.models.couplings import couplings
from decoct.models.families import decoder_layers, decoder_linears
from decoct.models.family_map import family_of
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import read_record, save_model_folder
from decoct.qat.auto_weights import WeightSettings
from decoct.qat.codes.state import load_quant_state
from decoct.qat.export.export import export_folder
from decoct.qat.spec import ActivationSpec, QuantSpec
from decoct.qat.transforms.folding import channels, fold_scales
from decoct.qat.transforms.settings import TransformSettings
from decoct.qat.verify.verify import verify_folder
from decoct.trainer.evaluation.figures import evaluate_model
from decoct.trainer.evaluation.model_row import measure_teacher, open_for_measuring
from decoct.trainer.settings_quantization import QuantizeSettings
from decoct.trainer.stages.context import StageContext
from decoct.trainer.stages.quantize import finish

from ...support.warm_python import WarmPython

MakeContext = Callable[..., StageContext]
WEIGHTS = QuantSpec(bits=4, group_size=16)
AWQ, SMOOTH, ROTATION = (TransformSettings(method=cast(Any, name)) for name in ("awq", "smoothquant", "rotation"))
ALL = [AWQ, TransformSettings(method="awq", clip=True), SMOOTH, ROTATION, TransformSettings(method="rotation", residual=False)]
IDS = ["awq", "awq-clip", "smoothquant", "rotation", "heads"]


def said(context: StageContext) -> str:
    return cast(Any, context.run.console.file).getvalue()


def hashes(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "decoct.json")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def rounding(context: StageContext) -> dict[str, Any]:
    return read_record(context.model)["quant"]["rounding"]


@pytest.fixture(scope="module")
def planted(trained_folder: Path, words: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model with gains of its norms times 32 in four channels, and the columns that read them divided by 32."""
    model = load_model(trained_folder, dtype=torch.float32)
    family = family_of(model)
    for layer in decoder_layers(model):
        for one in couplings(model.config):
            if one.norm:
                scales = torch.ones(channels(family, one, layer), dtype=torch.float64)
                scales[::12] = 1 / 32
                fold_scales(layer, family, one, scales)
    folder = tmp_path_factory.mktemp("planted") / "model"
    # powers of two: bf16 holds the same numbers
    return save_model_folder(folder, model, words, {"kind": "pretrain"}, dtype=torch.bfloat16)


def kl(make_context: MakeContext, teacher: Path, folder: Path, name: str, settings: QuantizeSettings) -> float:
    """KL from the teacher of the folder after a stage with these settings."""
    context = make_context(name, input=str(folder))
    finish(settings, context, None)
    model, taught = open_for_measuring(str(context.model), None), measure_teacher(str(teacher), None, context.run.v_eff)
    return cast(float, evaluate_model(model, taught, context.run.data.evaluation).kl)


W4 = QuantizeSettings(weights=WEIGHTS)
W8A8 = QuantizeSettings(weights=QuantSpec(bits=8, group_size="channel"), activations=ActivationSpec())


@pytest.mark.slow
@pytest.mark.parametrize("settings", [W4, W8A8], ids=["w4", "w8a8"])
def test_planted_outliers_cost_nothing_with_a_transform(
    make_context: MakeContext, trained_folder: Path, planted: Path, settings: QuantizeSettings
) -> None:
    """The same function with large and small channels: rounding alone loses more, each transform as little as on the clean model."""
    clean = kl(make_context, trained_folder, trained_folder, "01-clean", settings)
    assert kl(make_context, trained_folder, planted, "02-planted", settings) > 1.5 * clean
    for number, transform in enumerate((AWQ, SMOOTH, ROTATION)):
        changed = replace(settings, transform=transform)
        without = kl(make_context, trained_folder, trained_folder, f"03-clean-{number}", changed)
        with_outliers = kl(make_context, trained_folder, planted, f"04-planted-{number}", changed)
        assert with_outliers < 1.1 * without, transform.method


@pytest.mark.parametrize("transform", ALL, ids=IDS)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_from_files_is_as_from_memory_bit_for_bit(make_context: MakeContext, transform: TransformSettings, method: Any) -> None:
    if transform.clip and method != "rtn":
        transform = AWQ
    settings = QuantizeSettings(weights=WEIGHTS, method=method, transform=transform)
    whole, streamed = make_context("01-whole"), make_context("01-streamed")
    finish(replace(settings, stream="never"), whole, None)
    finish(replace(settings, stream="always"), streamed, None)
    assert hashes(streamed.model) == hashes(whole.model)
    assert rounding(streamed) == rounding(whole)
    assert "layer by layer" in said(streamed)


@pytest.mark.parametrize("transform", ALL, ids=IDS)
def test_the_folder_is_a_plain_model_that_is_exported_exactly(
    make_context: MakeContext, transform: TransformSettings, tmp_path: Path
) -> None:
    context = make_context("01-quantize")
    finish(replace(W4, transform=transform), context, None)
    record = rounding(context)["transform"]
    assert record["method"] == transform.method
    if transform.method == "rotation":
        assert record["seed"] == context.run.seed
        assert record["heads"] == {"size": 12, "hadamard": "12"}
    else:
        assert set(record["scaled"]) == {"input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"}
        assert all(told["layers"] == 3 and told["scales"][0] < 1 < told["scales"][1] for told in record["scaled"].values())
    config = json.loads((context.model / "config.json").read_text())
    assert config["tie_word_embeddings"] is not bool(transform.residual)
    export_folder(context.model, tmp_path / "export", "compressed-tensors", runtimes=False)
    assert verify_folder(tmp_path / "export", source=context.model, runtimes=False).problems == []


@torch.no_grad()
@pytest.mark.parametrize("transform", [AWQ, ROTATION], ids=["awq", "rotation"])
def test_transformers_alone_loads_the_folder(
    make_context: MakeContext, transform: TransformSettings, tmp_path: Path, warm: WarmPython
) -> None:
    context = make_context("01-quantize")
    finish(replace(W4, transform=transform), context, None)
    script = tmp_path / "load.py"
    script.write_text(
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "with torch.no_grad():\n    print('sum', float(model(input_ids=torch.arange(1, 9)[None]).logits.double().sum()))\n"
    )
    done = warm.run([str(script), str(context.model)], timeout=120)
    assert done.returncode == 0, done.stderr
    ours = load_model(context.model, dtype=torch.float32)(input_ids=torch.arange(1, 9)[None]).logits.double().sum()
    assert float(done.stdout.split()[-1]) == pytest.approx(float(ours), rel=1e-6)


def test_what_was_done_is_said(make_context: MakeContext) -> None:
    context = make_context("01-awq")
    finish(replace(W4, transform=AWQ), context, None)
    assert "calibrates on" in said(context)
    assert "awq: mlp.up_proj, scales from 0." in said(context) and "error of the outputs 0." in said(context)
    context = make_context("02-rotation")
    finish(replace(W4, transform=ROTATION), context, None)
    assert "adds 28,800 bytes in bf16" in said(context)
    assert "rotated the residual stream: Hadamard matrix of order 48 = 4 x 12, seed 0" in said(context)
    assert "the output head has weights of its own from here on" in said(context)


def test_other_seeds_rotate_otherwise_and_the_same_seed_alike(make_context: MakeContext) -> None:
    found = []
    for name, seed in (("01-one", 0), ("01-again", 0), ("01-other", 1)):
        context = make_context(name, seed=seed)
        finish(replace(W4, transform=ROTATION), context, None)
        found.append(hashes(context.model)["model.safetensors"])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("transform", [AWQ, SMOOTH, ROTATION], ids=["awq", "smoothquant", "rotation"])
def test_zeros_stay_zero_or_are_refused(
    make_context: MakeContext, trained_folder: Path, tmp_path: Path, words: Any, transform: TransformSettings
) -> None:
    model = load_model(trained_folder, dtype=torch.float32)
    linears = decoder_linears(model)
    sparse = [name for name in linears if name.endswith(("up_proj", "q_proj", "o_proj"))]
    for name in sparse:
        weight = linears[name].weight.data
        weight[weight.abs() < weight.abs().median()] = 0
    folder = save_model_folder(tmp_path / "sparse", model, words, {"sparse": sparse}, dtype=torch.bfloat16)
    context = make_context("01-quantize", input=str(folder))
    if transform is ROTATION:
        with pytest.raises(UserError, match="pruned weights would not stay zero; use transform: awq or smoothquant"):
            finish(replace(W4, transform=transform), context, None)
        assert not context.model.exists()
        return
    finish(replace(W4, transform=transform), context, None)
    written = decoder_linears(load_model(context.model, dtype=torch.float32))
    assert all(not written[name].weight[linears[name].weight == 0].any() for name in sparse)
    assert read_record(context.model)["sparse"] == sparse


def test_chosen_widths_and_a_transform_go_together(make_context: MakeContext) -> None:
    weights = WeightSettings(bits="auto", budget=4.5, group_size=16, sensitivity_tokens=512)
    context = make_context("01-quantize")
    finish(QuantizeSettings(weights=weights, transform=AWQ), context, None)
    chosen, state = rounding(context)["bits"], load_quant_state(context.model)
    assert rounding(context)["transform"]["method"] == "awq" and len(set(chosen["widths"].values())) > 1
    assert {name: state.spec_of(name).bits for name in state.modules} == {n: w for n, w in chosen["widths"].items() if w != 16}


def test_clipping_loses_less_at_few_bits(make_context: MakeContext, trained_folder: Path) -> None:
    settings = QuantizeSettings(weights=QuantSpec(bits=3, group_size="channel"))
    losses = [
        kl(make_context, trained_folder, trained_folder, f"01-{name}", replace(settings, transform=transform))
        for name, transform in (("none", None), ("awq", AWQ), ("clip", TransformSettings(method="awq", clip=True)))
    ]
    assert losses[2] < losses[1] < losses[0]
