"""Stages that a recipe imports: what their function gets, what becomes of what it leaves, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.models.families import decoder_linears
from decoct.models.folder.folder_checks import check_model_folder
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import read_record
from decoct.parts import PartError
from decoct.trainer.plan import derive_seed
from decoct.trainer.settings import PretrainSettings, TrainerSettings
from decoct.trainer.settings_pruning import MagnitudeSettings, PruneSettings
from decoct.trainer.stages import own, pretrain, prune
from decoct.trainer.stages.context import StageContext, StageResult
from decoct.trainer.stages.registry import STAGE_KINDS, stage_kind

from ...support.own_parts import parts_of_text

MakeContext = Callable[..., StageContext]
FILE = """
@parts.stage("shift")
def shift(context, *, by: float = 0.5):
    model = context.load()
    shift.seen = context
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(by)
    context.say(f"moved by {by}")
    context.save(model, {"by": by})
    return {"by": by}

@parts.stage("own_folder")
def own_folder(context):
    context.load().save_pretrained(context.output)

@parts.stage("nothing")
def nothing(context):
    pass

@parts.stage("looks", makes_model=False)
def looks(context):
    rows = [batch["input_ids"].shape for batch in context.batches(context.evaluation, 7)]
    return {"windows": sum(shape[0] for shape in rows), "largest": rows[0][0]}

@parts.stage("sneaks", makes_model=False)
def sneaks(context):
    context.save(context.load())

@parts.stage("returns")
def returns(context):
    return 3

@parts.stage("facts", makes_model=False)
def facts(context):
    return {"a": torch.ones(1)}

@parts.stage("rubbish")
def rubbish(context):
    context.output.mkdir()
    (context.output / "x").write_text("x")
"""


MOVES = """
@parts.callback("moves")
class Moves:
    def on_start(self, student, optimizer):
        self.weights = list(student.parameters())
    def after_step(self, step):
        with torch.no_grad():
            for weight in self.weights:
                weight.add_(1.0)
"""


@pytest.fixture
def finish(tmp_path: Path, make_context: MakeContext) -> Any:
    """finish(name, options, **context): the result of the stage, and its context."""
    found = parts_of_text(tmp_path, FILE)

    def run(name: str, options: dict[str, Any] | None = None, **changes: Any) -> tuple[StageResult, StageContext]:
        made = found.settings("stage", name)
        assert made is not None
        settings, context = made(**options or {}), make_context(f"01-{name}", kind=name, **changes)
        assert stage_kind(name, settings).load().finish is own.finish
        return own.finish(settings, context, None), context

    return run


def test_a_stage_reads_one_model_folder_and_writes_one(finish: Any, trained_folder: Path) -> None:
    result, context = finish("shift", {"by": 0.25})
    assert (result.model, result.facts) == (context.model, {"facts": {"by": 0.25}})
    before, after = (load_model(folder, dtype=torch.float32).state_dict() for folder in (trained_folder, context.model))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(after[name], (before[name] + 0.25).to(torch.bfloat16).float())
    record = read_record(context.model)
    assert {key: record[key] for key in ("kind", "stage", "stage_key", "base_model", "facts")} == {
        "kind": "shift", "stage": "01-shift", "stage_key": "key", "base_model": "tiny", "facts": {"by": 0.25},
    }  # fmt: skip
    assert "moved by 0.25" in context.run.console.file.getvalue()


def test_the_function_gets_folders_seed_device_and_text(finish: Any, trained_folder: Path) -> None:
    _, context = finish("shift", seed=7)
    seen = own.own_context(context)
    assert (seen.name, seen.input, seen.output, seen.work) == ("01-shift", trained_folder, context.model, context.folder)
    assert seen.seed == derive_seed(7, "01-shift")
    assert seen.device == torch.device("cpu")
    assert (seen.train, seen.evaluation, seen.tokenizer) == (context.run.data.train, context.run.data.evaluation, context.run.tokenizer)
    assert seen.teacher is None


def test_a_stage_that_makes_no_model_leaves_facts(finish: Any) -> None:
    result, context = finish("looks")
    assert result.model is None
    assert result.facts == {"facts": {"windows": len(context.run.data.evaluation), "largest": 7}}


def test_a_folder_that_the_function_writes_itself_gets_tokenizer_and_record(finish: Any) -> None:
    result, context = finish("own_folder")
    check_model_folder(result.model)
    assert (context.model / "tokenizer.json").is_file()
    assert read_record(context.model)["kind"] == "own_folder"


def test_zeros_of_a_pruned_input_stay_zero(finish: Any, make_context: MakeContext) -> None:
    pruned = make_context("00-prune", kind="prune")
    prune.finish(PruneSettings(magnitude=MagnitudeSettings(keep=0.5)), pruned, None)
    result, _ = finish("shift", input=str(pruned.model))
    before, after = (decoder_linears(load_model(folder, dtype=torch.float32)) for folder in (pruned.model, result.model))
    for name, linear in before.items():
        zeros = linear.weight == 0
        assert zeros.float().mean() > 0.1
        assert torch.equal(after[name].weight == 0, zeros), name
    assert read_record(result.model)["sparse"] == list(before)


def test_zeros_stay_zero_while_a_callback_moves_every_weight(make_context: MakeContext, tmp_path: Path) -> None:
    pruned = make_context("00-prune", kind="prune")
    prune.finish(PruneSettings(magnitude=MagnitudeSettings(keep=0.5)), pruned, None)
    mover = parts_of_text(tmp_path, MOVES).settings("callback", "moves")
    assert mover is not None
    trainer = TrainerSettings(precision="32", global_batch_tokens=256, evaluate_every=0)
    context = make_context("01-pretrain", kind="pretrain", input=str(pruned.model), trainer=trainer)
    trained = pretrain.train(PretrainSettings(steps=2, callbacks=(mover(),)), context)
    before = decoder_linears(load_model(pruned.model, dtype=torch.float32))
    for name, linear in decoder_linears(trained.student).items():
        zeros = before[name].weight == 0
        assert torch.equal(linear.weight == 0, zeros), name
        # the callback has moved the others by 1 in each step, which training alone does not
        assert (linear.weight - before[name].weight)[~zeros].min() > 1.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"my_parts.py:20: stage 'nothing' wrote no model; call context.save\(model\), or register it with makes_model=False"),
        ("sneaks", r"my_parts.py:29: stage 'sneaks' wrote a model; register it with makes_model=True"),
        ("returns", r"my_parts.py:33: stage 'returns' must return nothing or a dict of facts; it returned int"),
        ("facts", r"my_parts.py:37: stage 'facts' returned facts that are no JSON: Object of type Tensor is not JSON serializable"),
        ("rubbish", r"my_parts.py:41: stage 'rubbish' wrote a folder that is no model folder"),
    ],
)
def test_what_a_stage_must_not_leave_is_refused_with_its_place(name: str, message: str, finish: Any) -> None:
    with pytest.raises(PartError, match=message):
        finish(name)


def test_kinds_of_decoct_are_known_by_name() -> None:
    assert stage_kind("prune", PruneSettings(magnitude=MagnitudeSettings(keep=0.5))) is STAGE_KINDS["prune"]
