"""Stage `prune` with a budget: which shape it finds, a killed search ends like a whole one, impossible budgets are refused early."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from decoct.models.common.errors import UserError
from decoct.models.folder.loading import load_model
from decoct.trainer.settings_pruning import PruneSettings, StructuredSettings
from decoct.trainer.settings_search import SearchSettings
from decoct.trainer.stages import prune
from decoct.trainer.stages.context import StageContext, StageResult

MakeContext = Callable[..., StageContext]


def said(context: StageContext) -> str:
    return context.run.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue] - a StringIO here


def budgeted(context: StageContext, **given: Any) -> StageResult:
    structured = StructuredSettings(**{"budget": 0.6, "search": SearchSettings(align=4, measured=6, windows=2), **given})
    settings = PruneSettings(structured=structured, calibration_tokens=256)
    assert prune.train(settings, context) is None
    return prune.finish(settings, context, None)


def test_the_shape_of_a_budget_is_the_one_of_least_kl(make_context: MakeContext, trained_folder: Path) -> None:
    context = make_context("01-prune", kind="prune")
    done = budgeted(context)
    search = done.facts["search"]
    kls = [row["kl"] for row in search["tried"]]
    assert len(kls) == 6
    assert kls == sorted(kls)
    assert search["chosen"] == search["tried"][0]["shape"]
    # the folder is that shape, within the budget
    parent: Any = load_model(trained_folder, dtype=torch.float32)
    left: Any = load_model(context.model, dtype=torch.float32)
    inside = [sum(p.numel() for name, p in model.named_parameters() if ".layers." in name) for model in (parent, left)]
    assert inside[1] <= 0.6 * inside[0]
    assert inside[1] == pytest.approx(search["tried"][0]["cost"] * inside[0])
    assert sum(p.numel() for p in left.parameters()) == search["tried"][0]["parameters"]
    assert f"chosen by KL as cut: {search['chosen']}" in said(context)
    # what was measured is known to the next search, whose budget may be another
    again = make_context("02-prune", kind="prune")
    assert budgeted(again).facts == done.facts
    assert search["others"] == []
    assert "KL " not in said(again).replace("KL as cut", "")
    assert "scores: computed before" in said(again)


def test_shapes_of_other_budgets_stand_beside_those_of_this_one(make_context: MakeContext) -> None:
    smaller = budgeted(make_context("01-prune", kind="prune"), budget=0.45).facts["search"]
    larger = budgeted(make_context("02-prune", kind="prune"), budget=0.7).facts["search"]
    wanted = [{"shape": row["shape"], "parameters": row["parameters"], "kl": row["kl"]} for row in smaller["tried"]]
    assert sorted(larger["others"], key=lambda row: row["kl"]) == wanted
    assert larger["tried"][0]["parameters"] > max(row["parameters"] for row in wanted)


def test_a_killed_search_goes_on_where_it_was(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    from decoct.trainer.stages import shape_search

    search = SearchSettings(align=4, measured=6, windows=2, tokens=64, halving=(3, 2))
    whole = budgeted(make_context("01-prune", kind="prune"), search=search).facts["search"]
    assert [len(row.get("distilled", ())) for row in whole["tried"]] == [2, 2, 1, 0, 0, 0]
    assert whole["tokens"] == [64, 256]
    finalists = whole["tried"][:2]
    assert finalists[0]["distilled"][1] <= finalists[1]["distilled"][1]
    assert finalists[0]["distilled"][1] < finalists[0]["kl"]

    context = make_context("01-prune", kind="prune")
    trained: list[str] = []
    fit = shape_search.fit_student

    def dies(student: Any, block: Any, inner: Any, *given: Any) -> Any:
        trained.append(inner.name)
        if len(trained) == 4:
            raise KeyboardInterrupt
        return fit(student, block, inner, *given)

    monkeypatch.setattr(shape_search, "fit_student", dies)
    shutil.rmtree(context.folder)
    with pytest.raises(KeyboardInterrupt):
        budgeted(context, search=search)
    assert not context.model.exists()
    assert budgeted(context, search=search).facts["search"] == whole
    # three of the first round, the one that died, and two of the second round
    assert len(trained) == 6
    assert trained[3] == trained[4]
    # of what was trained only figures are left
    assert sorted(path.name for path in (context.folder / "search").iterdir()) == ["ranked.json", "round-0.json", "round-1.json"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"budget": 0.01}, "below the smallest aligned shape"),
        ({"budget": "50GB"}, "holds the whole model"),
        ({"budget": 0.6, "search": SearchSettings(least=1.0)}, "below the smallest aligned shape"),
    ],
)
def test_an_impossible_budget_is_refused_before_weights_are_read(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, given: Any, told: str
) -> None:
    monkeypatch.setattr("decoct.trainer.stages.prune_structured.whole_student", lambda context: pytest.fail("it was loaded"))
    context = make_context("01-prune", kind="prune")
    with pytest.raises(UserError, match=told):
        budgeted(context, **given)
    assert not context.model.exists()
