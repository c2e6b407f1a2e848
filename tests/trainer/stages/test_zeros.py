"""Exact zeros of a pruned model through every stage, and every stage after every other."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.losses.settings import LossSettings
from decoct.models.common.errors import UserError
from decoct.models.families import decoder_linears, family_of
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import read_record, save_model_folder
from decoct.models.pruning.pattern import Pattern
from decoct.models.pruning.selection import follows
from decoct.models.pruning.zeros_record import of_kept_layers, sparse_modules
from decoct.models.student import student_by_keeping
from decoct.qat.spec import QuantSpec
from decoct.trainer.settings import (
    DistillSettings,
    PretrainSettings,
    TrainerSettings,
)
from decoct.trainer.settings_pruning import MagnitudeSettings, PruneSettings, StructuredSettings
from decoct.trainer.settings_quantization import QatSettings, QuantizeSettings
from decoct.trainer.settings_sparsity import MovementSettings, SparseGptSettings, WandaSettings
from decoct.trainer.stages.context import StageContext
from decoct.trainer.stages.registry import STAGE_KINDS

# labels too: a model that learns from itself alone would stay as it is, zeros and all
STEPS: dict[str, Any] = {"steps": 2, "learning_rate": 1e-2, "warmup": 0.0, "loss": LossSettings(hard_weight=0.5)}
TRAINER = TrainerSettings(precision="32", global_batch_tokens=128)
SPEC = QuantSpec(bits=4, group_size=16)
STAGES: dict[str, tuple[str, Any]] = {
    "pretrain": ("pretrain", PretrainSettings(**STEPS)),
    "distill": ("distill", DistillSettings(**STEPS, teacher="input")),
    "magnitude-once": ("prune", PruneSettings(magnitude=MagnitudeSettings(keep=0.5))),
    "magnitude-scheduled": ("prune", PruneSettings(magnitude=MagnitudeSettings(keep=0.6, update_every=1), **STEPS, teacher="input")),
    "wanda": ("prune", PruneSettings(wanda=WandaSettings(keep=0.5), calibration_tokens=256)),
    "sparsegpt-2:4": ("prune", PruneSettings(sparsegpt=SparseGptSettings(pattern="2:4"), calibration_tokens=256)),
    "movement": ("prune", PruneSettings(movement=MovementSettings(keep=0.6, update_every=1), **STEPS, teacher="input")),
    "structured": ("prune", PruneSettings(structured=StructuredSettings(ffn=48), calibration_tokens=256)),
    "shape": (
        "prune",
        PruneSettings(structured=StructuredSettings(ffn=64, hidden=32, layers=2, score="magnitude"), calibration_tokens=256),
    ),
    "qat": ("qat", QatSettings(weights=SPEC, **STEPS, teacher="input", start="mse")),
    "qat-gptq": ("qat", QatSettings(weights=SPEC, **STEPS, teacher="input", calibration_tokens=256)),
    "qat-scales": ("qat", QatSettings(weights=SPEC, **STEPS, teacher="input", train="scales", start="rtn")),
    "qat-lora": ("qat", QatSettings(weights=SPEC, **STEPS, teacher="input", lora=2)),
    "rtn": ("quantize", QuantizeSettings(weights=SPEC, method="rtn")),
    "rtn-asymmetric": ("quantize", QuantizeSettings(weights=QuantSpec(bits=3, group_size=16, symmetric=False), method="rtn")),
    "mse": ("quantize", QuantizeSettings(weights=SPEC, method="mse")),
    "gptq": ("quantize", QuantizeSettings(weights=SPEC, method="gptq", calibration_tokens=256)),
    "keep-layers": ("", None),
}  # fmt: skip
ONE_BY_ONE = ("wanda", "sparsegpt-2:4", "movement")
"""Stages that choose single weights by what these do."""
Made = Callable[[str, Path], Path]


@pytest.fixture
def made(make_context: Callable[..., StageContext]) -> Made:
    """``made(stage, input)``: the model folder that a stage makes of another."""
    count: Iterator[int] = itertools.count()

    def make(stage: str, source: Path) -> Path:
        kind, settings = STAGES[stage]
        context = make_context(f"{next(count):02d}-{stage}", kind=kind, input=str(source), trainer=TRAINER)
        if not kind:
            teacher = load_model(source, dtype=torch.float32)
            student, kept = student_by_keeping(teacher, 2)
            names = of_kept_layers(sparse_modules(source), family_of(teacher), kept)
            return save_model_folder(context.model, student, context.run.tokenizer, {"sparse": names}, dtype=torch.bfloat16)
        work = STAGE_KINDS[kind].load()
        assert work.finish is not None
        if work.start:
            work.start(settings, context)
        trained = work.train(settings, context) if work.train else None
        return work.finish(settings, context, trained).model

    return make


@pytest.fixture(scope="module")
def pruned(trained_folder: Path, words: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with 30 % zeros in all matrices but those of one kind, which have zeros by chance."""
    model = load_model(trained_folder, dtype=torch.float32)
    names = []
    for name, linear in decoder_linears(model).items():
        weight = linear.weight.data
        weight[weight.abs() < weight.abs().flatten().quantile(0.3)] = 0
        if not name.endswith("o_proj"):
            names.append(name)
    return save_model_folder(tmp_path_factory.mktemp("pruned") / "model", model, words, {"sparse": names}, dtype=torch.bfloat16)


def rows_of(kept: dict[str, Any], name: str, dim: int) -> Any:
    """Rows or columns of a matrix of Llama that a cut has kept, from its record."""
    block, _, leaf = name.rpartition(".")
    rows = "hidden" if (leaf in ("o_proj", "down_proj")) == (dim == 0) else "ffn" if block.endswith("mlp") else "heads"
    if rows == "heads" and leaf in ("k_proj", "v_proj"):
        rows = "kv_heads"
    if rows not in kept:
        return slice(None)
    chosen = torch.tensor(kept[rows] if rows == "hidden" else kept[rows][block])
    # a head has 12 channels
    return chosen if rows in ("hidden", "ffn") else (chosen[:, None] * 12 + torch.arange(12)).flatten()


def check_kept(before: Path, after: Path) -> None:
    """What was a zero of the record is one, as far as it is still there, and the record names every matrix that is left."""
    source, result = load_model(before, dtype=torch.float32), load_model(after, dtype=torch.float32)
    own = decoder_linears(result)
    kept = read_record(after).get("kept", {})
    layers = kept.get("layers") if "layers" in kept else None
    if layers is None and len(own) != len(decoder_linears(source)):
        layers = [0, source.config.num_hidden_layers - 1]
    family = family_of(source)
    seen = 0
    for name in sparse_modules(before):
        renamed = family.renumbered(name, layers if layers is not None else range(source.config.num_hidden_layers))
        if renamed is None:
            continue
        assert renamed in sparse_modules(after)
        zeros = source.get_parameter(f"{name}.weight") == 0
        if zeros.shape != own[renamed].weight.shape:
            zeros = zeros[rows_of(kept, name, 0)][:, rows_of(kept, name, 1)]
        assert not own[renamed].weight[zeros].any(), renamed
        seen += int(zeros.sum())
    assert seen > 1000
    assert set(sparse_modules(after)) <= own.keys()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_keeps_zeros_and_their_record(stage: str, made: Made, pruned: Path) -> None:
    check_kept(pruned, made(stage, pruned))


def test_zeros_of_the_heads_that_stay_are_kept(make_context: Callable[..., StageContext], pruned: Path) -> None:
    context = make_context("heads", kind="prune", input=str(pruned))
    settings = PruneSettings(structured=StructuredSettings(kv_heads=1, score="taylor"), calibration_tokens=256)
    STAGE_KINDS["prune"].load().finish(settings, context, None)  # pyright: ignore[reportOptionalCall]
    check_kept(pruned, context.model)


@pytest.mark.slow
@pytest.mark.parametrize("first", STAGES)
def test_every_stage_after_every_other_keeps_zeros_and_their_record(first: str, made: Made, pruned: Path) -> None:
    between = made(first, pruned)
    for second in STAGES:
        if {first, second} <= {"structured", "shape"}:
            continue  # the channels are that few already
        if second in ONE_BY_ONE and first not in (*ONE_BY_ONE, "structured", "qat"):
            continue  # they see weights and zeros, whatever made them: behind a few stages is behind all
        after = made(second, between)
        check_kept(between, after)
        if first.endswith("2:4") and second not in ("structured", "shape"):
            # fewer channels are other groups of the down projection
            model = load_model(after, dtype=torch.float32)
            assert all(follows(linear.weight, Pattern(2, 4)) for linear in decoder_linears(model).values()), second


@pytest.mark.parametrize("second", ["distill", "qat", "gptq", "magnitude-scheduled"])
@pytest.mark.parametrize("first", ["structured", "shape", "keep-layers"])
def test_zeros_of_a_smaller_model_stay(first: str, second: str, made: Made, pruned: Path) -> None:
    between = made(first, pruned)
    check_kept(between, made(second, between))


def test_zeros_by_chance_train(made: Made, pruned: Path) -> None:
    """What no record names is no mask."""
    result = load_model(made("distill", pruned), dtype=torch.float32)
    before = load_model(pruned, dtype=torch.float32)
    name = "model.layers.1.self_attn.o_proj"
    was, now = (model.get_parameter(f"{name}.weight") == 0 for model in (before, result))
    assert int(was.sum()) > 500
    assert int((was & now).sum()) < 0.5 * int(was.sum())


def unlisted(folder: Path, tmp_path: Path) -> Path:
    """The folder as another tool would have written it: with zeros, and nothing that lists them."""
    copy = tmp_path / "foreign"
    copy.mkdir()
    for file in folder.iterdir():
        if file.name != "decoct.json":
            (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_zeros_that_no_record_names_are_told_and_kept_as_the_hint_says(
    made: Made, make_context: Callable[..., StageContext], pruned: Path, tmp_path: Path
) -> None:
    foreign = unlisted(pruned, tmp_path)
    context = make_context("told", kind="distill", input=str(foreign), trainer=TRAINER)
    STAGE_KINDS["distill"].load().train(STAGES["distill"][1], context)  # pyright: ignore[reportOptionalCall]
    said = context.run.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "30% of the student's linear weights are exact zeros" in said
    assert "prune: {magnitude: {keep: 0.99, scope: global}}" in said
    listed = make_context("listed", kind="prune", input=str(foreign))
    STAGE_KINDS["prune"].load().finish(PruneSettings(magnitude=MagnitudeSettings(keep=0.99, scope="global")), listed, None)  # pyright: ignore[reportOptionalCall]
    source, result = load_model(foreign, dtype=torch.float32), load_model(listed.model, dtype=torch.float32)
    assert all(torch.equal(weight, result.get_parameter(name)) for name, weight in source.named_parameters())
    assert sparse_modules(listed.model) == list(decoder_linears(source))
    check_kept(listed.model, made("distill", listed.model))


def test_a_quantized_input_is_not_told_of_its_zeros(made: Made, make_context: Callable[..., StageContext], trained_folder: Path) -> None:
    context = make_context("after", kind="distill", input=str(made("rtn", trained_folder)), trainer=TRAINER)
    STAGE_KINDS["distill"].load().train(STAGES["distill"][1], context)  # pyright: ignore[reportOptionalCall]
    assert "exact zeros" not in context.run.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("stage", ["distill", "structured", "magnitude-once", "rtn", "qat"])
def test_a_record_that_does_not_fit_is_refused_by_every_stage(stage: str, made: Made, pruned: Path, tmp_path: Path) -> None:
    folder = unlisted(pruned, tmp_path)
    for listed, problem in ((["model.layers.9.mlp.up_proj"], "lists model.layers.9.mlp.up_proj as sparse"), ("all", "must be a list")):
        (folder / "decoct.json").write_text(json.dumps({"format": 1, "sparse": listed}))
        with pytest.raises(UserError, match=problem):
            made(stage, folder)
