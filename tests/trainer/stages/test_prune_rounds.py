"""Stage `prune` in rounds: killed anywhere it resumes to the same bits, and its record has indices of the stage's input."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.models.common.cache_folder import cache_dir
from decoct.models.common.errors import UserError
from decoct.models.family_map import family_of
from decoct.models.folder.loading import load_model
from decoct.models.folder.model_folder import read_record
from decoct.models.pruning.kept_record import kept_of, root_of
from decoct.models.pruning.structured import cut
from decoct.models.sizes import sizes_of
from decoct.trainer.settings import TrainerSettings
from decoct.trainer.settings_pruning import MagnitudeSettings, PruneSettings, StructuredSettings
from decoct.trainer.stages import prune, prune_rounds
from decoct.trainer.stages.context import StageContext, StageResult

MakeContext = Callable[..., StageContext]
SHAPE: dict[str, Any] = {"ffn": 48, "layers": 2}


def said(context: StageContext) -> str:
    return context.run.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue] - a StringIO here


def rounds(context: StageContext, given: dict[str, Any] | None = None, **shape: Any) -> StageResult:
    structured = StructuredSettings(**{**SHAPE, "rounds": 0.3, **shape})
    settings = PruneSettings(structured=structured, calibration_tokens=256, checkpoint_every=2, **(given or {"steps": 24}))
    # steps of 8 windows
    context = replace(context, run=replace(context.run, trainer=TrainerSettings(precision="32", global_batch_tokens=256)))
    return prune.finish(settings, context, prune.train(settings, context))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_each_round_cuts_and_distils_and_the_record_speaks_of_the_stages_input(make_context: MakeContext, trained_folder: Path) -> None:
    context = make_context("01-prune", kind="prune")
    done = rounds(context, repair=True)
    assert done.model is not None
    told = done.facts["rounds"]
    assert len(told) == 3
    assert [one["share"] for one in told] == sorted((one["share"] for one in told), reverse=True)
    assert "layers=2" in " ".join(one["shape"] for one in told)
    # a third of the steps for each
    assert [one["tokens"] for one in told] == [8 * 256] * 3
    assert done.tokens == 24 * 256
    assert f"round 2 of 3: {told[1]['shape']}, {told[1]['share']:.1%} of the decoder layers' parameters" in said(context)
    assert any(one["repairs"] for one in told)
    # the cache has the scores of the stage's input alone
    assert len(list((cache_dir() / "scores").iterdir())) == 1

    student: Any = load_model(done.model, dtype=torch.float32)
    assert (student.config.intermediate_size, student.config.num_hidden_layers) == (48, 2)
    # the indices name the very channels of the input: training moved them a little
    parent: Any = load_model(trained_folder, dtype=torch.float32)
    family, record = family_of(parent), read_record(done.model)
    kept = kept_of(record["kept"], family, 3)
    assert kept is not None
    assert root_of(record, family, sizes_of(student.config, family)) == (sizes_of(parent.config, family), kept)
    assert record["rounds"] == told
    whole: Any = cut(parent, kept)
    pairs = [(model.model.layers[1].mlp.up_proj.weight.detach().flatten()) for model in (student, whole)]
    assert float(torch.corrcoef(torch.stack(pairs))[0, 1]) > 0.9

    # the same amount of training after one cut is the same kind of stage with one round
    once = rounds(make_context("02-prune", kind="prune"), rounds=0.9)
    assert len(once.facts["rounds"]) == 1


def test_the_steps_of_all_rounds_are_those_of_the_stage(make_context: MakeContext) -> None:
    context = make_context("01-prune", kind="prune")
    # seven steps of 8 windows, and three rounds
    done = rounds(context, given={"steps": None, "tokens": 7 * 256 - 100})
    assert [one["tokens"] for one in done.facts["rounds"]] == [2 * 256, 2 * 256, 3 * 256]
    assert done.tokens == 7 * 256


def test_a_teacher_that_knows_the_windows_of_one_round_is_opened_again(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = prune_rounds.stage_teacher, []
    monkeypatch.setattr(prune_rounds, "stage_teacher", lambda *given: asked.append(given[-1]) or real(*given))
    rounds(make_context("01-prune", kind="prune"))
    assert len(asked) == 1
    monkeypatch.setattr(prune_rounds, "knows_given_text_alone", lambda teacher: True)
    rounds(make_context("02-prune", kind="prune"))
    assert len(asked) == 1 + 3


class KilledError(Exception):
    pass


class Kill:
    """Ends the process, so to speak, before a step."""

    name = "kill"

    def __init__(self, step: int) -> None:
        self.on_start = self.after_step = self.load = lambda *_: None
        self.state = dict[str, Any]
        self._step = step

    def before_step(self, step: int) -> None:
        if step == self._step:
            raise KilledError


@pytest.mark.parametrize("killed_at", ["prune_structured-1", "keep_zeros_hooks-2", "save_student-2", "fit_student-3"])
def test_a_killed_stage_resumes_to_the_same_bits(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, killed_at: str) -> None:
    context = make_context("01-prune", kind="prune")
    whole = rounds(context)
    assert whole.model is not None
    first = weights(whole.model)
    # a folder of the same name, so that windows come in the same order
    context.folder.rename(context.folder.with_name("before"))
    name, number = killed_at.split("-")
    real = getattr(prune_rounds, name)
    calls: list[int] = []

    def dies(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) != int(number):
            return real(*given, **named)
        if name == "keep_zeros_hooks":
            # in the middle of a round, after a checkpoint
            return [Kill(6)]
        raise KilledError

    monkeypatch.setattr(prune_rounds, name, dies)
    context = make_context("01-prune", kind="prune")
    with pytest.raises(KilledError):
        rounds(context)
    assert not context.model.exists()
    again = rounds(context)
    assert again.model is not None
    assert weights(again.model) == first
    assert [{**one, "seconds": 0} for one in again.facts["rounds"]] == [{**one, "seconds": 0} for one in whole.facts["rounds"]]
    # what was finished before is not done again; the last student is saved elsewhere
    assert len(calls) == (2 if name == "save_student" else 3) + 1
    assert name != "keep_zeros_hooks" or "01-prune-round-2: continues from the checkpoint of step 4" in said(context)


def test_zeros_of_an_earlier_stage_stay_zero_through_all_rounds(make_context: MakeContext) -> None:
    sparse = make_context("01-prune", kind="prune")
    prune.finish(PruneSettings(magnitude=MagnitudeSettings(keep=0.5)), sparse, None)
    context = make_context("02-prune", kind="prune", input=str(sparse.model))
    done = rounds(context)
    assert done.model is not None
    assert read_record(done.model)["sparse"]
    student: Any = load_model(done.model, dtype=torch.float32)
    assert 0.3 < float((student.model.layers[0].mlp.down_proj.weight == 0).float().mean()) < 0.7


def test_an_impossible_shape_is_refused_before_weights_are_read(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context("01-prune", kind="prune")
    monkeypatch.setattr(prune_rounds, "open_student", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr(prune_rounds, "prune_structured", lambda *_: pytest.fail("it was cut"))
    with pytest.raises(UserError, match=r"structured\.ffn=500 keeps more FFN channels"):
        rounds(context, ffn=500)
    assert not (context.folder / "rounds").exists()
