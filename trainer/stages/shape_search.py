"""Finds the shape of a budget for stage `prune`: ranks shapes by their KL as cut, and distils the best of them where it is asked."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ...models.axis_map import Axis
from ...models.common.files import sha256_json
from ...models.dimensions import hidden_size
from ...models.pruning.kept import Kept
from ...models.pruning.parent_outputs import ParentOutputs
from ...models.pruning.ranks import Ranks
from ...models.pruning.score_cache import ScoreCache
from ...models.pruning.score_store import ScoreStore
from ...models.pruning.shape_ranking import ShapeRanking
from ...models.pruning.structured import cut
from ...models.shape_search import ShapeSpace
from ..loop.metrics import MetricsSink
from ..processes.world import connect, current_world, sum_over_ranks
from ..settings import DistillSettings
from ..settings_pruning import PruneSettings
from ..stage_plan import derive_plan, derive_steps
from .calibration import calibration_text
from .context import StageContext
from .score_caches import score_cache, shape_space
from .student_and_teacher import OpenStudent, stage_strategy, stage_teacher, whole_student
from .training import fit_student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batches = Sequence[Mapping[str, torch.Tensor]]
_POLL_SECONDS = 0.2
_RANKED = "ranked"


@dataclass(frozen=True)
class Found:
    """The shape that was found."""

    kept: dict[Axis, int]
    """Axis -> what is kept of it."""
    facts: dict[str, Any]
    """What was tried, for the report."""


def find_shape(settings: PruneSettings, context: StageContext, space: ShapeSpace, cache: ScoreCache, text: Batches) -> Found:
    """The best shape of the budget (rank 0), after ``distil_shapes`` if the settings ask for it."""
    assert settings.structured is not None
    search, before = settings.structured.found_by, space.before
    ranking = _ranking(settings, context, space, cache, text)
    ranked = ranking.best(space.shapes, search.measured)
    rounds = [_round(context, number) for number in range(len(search.rounds()))]
    rows = []
    for one in ranked:
        name = one.shape.words(before)
        distilled = [kl for kls in rounds if (kl := kls.get(name)) is not None]
        told = {"shape": name, "parameters": one.shape.parameters, "cost": one.shape.cost, "kl": one.kl}
        rows.append({**told, **({"distilled": distilled} if distilled else {})})
    # those of later rounds go before those that were left behind
    order = sorted(range(len(rows)), key=lambda at: (-len(rows[at].get("distilled", ())), rows[at].get("distilled", [rows[at]["kl"]])[-1]))
    best = ranked[order[0]].shape
    by = "KL after short distillation" if "distilled" in rows[order[0]] else "KL as cut"
    context.say(f"  chosen by {by}: {best.words(before)} ({best.parameters / 1e6:,.2f}M parameters, {space.budget.words(best.cost)})")
    facts = {
        "budget": space.budget.words(),
        "shapes": len(space.shapes),
        "windows": search.windows,
        "tokens": [tokens for _, tokens in search.rounds()],
        "chosen": best.words(before),
        "tried": [rows[at] for at in order],
        "others": [{"shape": name, **told} for name, told in ranking.known().items() if name not in {row["shape"] for row in rows}],
    }
    return Found(best.kept(before), facts)


def distil_shapes(settings: PruneSettings, context: StageContext) -> None:
    """Distils the best shapes in rounds, each with fewer of them and four times the tokens (all ranks). A killed one goes on."""
    structured = settings.structured
    assert structured is not None
    rounds = structured.found_by.rounds()
    if structured.budget is None or not rounds:
        return
    world = current_world()
    connect(world)
    ranks = Ranks(world.rank, world.size, sum_over_ranks)
    model = whole_student(context)
    text = calibration_text(context.run.data.train, settings.calibration_tokens or 1, context.run.seed).batches
    store = ScoreStore(context.folder / "search")
    if world.is_first and not store.numbers(_RANKED):
        space = shape_space(model.config, structured)
        ranking = _ranking(settings, context, space, score_cache(context, model, text), text)
        best = ranking.best(space.shapes, structured.found_by.measured)[: rounds[0][0]]
        store.put_numbers(_RANKED, {"names": [one.shape.words(space.before) for one in best], "kept": [vars(one.kept) for one in best]})
    # the ranking takes its time: waiting in a collective could time out
    while not store.numbers(_RANKED):
        time.sleep(_POLL_SECONDS)
    ranked = store.numbers(_RANKED)
    kept = {name: Kept(**indices) for name, indices in zip(ranked["names"], ranked["kept"], strict=True)}
    training = _Candidates(settings, context, model, _windows(text, structured.found_by.windows), ranks)
    names = list(kept)
    for number, (shapes, tokens) in enumerate(rounds):
        names = names[:shapes]
        context.say(f"  search: round {number + 1} of {len(rounds)}, {len(names)} shapes on {tokens:,} tokens each")
        kls = {name: training.kl(number, tokens, name, kept[name]) for name in names}
        # of equal ones the one that was better before
        names = sorted(names, key=kls.__getitem__)


class _Candidates:
    """Trains one shape after the other."""

    def __init__(self, settings: PruneSettings, context: StageContext, model: "PreTrainedModel", windows: Batches, ranks: Ranks) -> None:
        self._settings, self._context, self._model, self._ranks = settings, context, model, ranks
        self._judge = ParentOutputs(model, windows) if ranks.rank == 0 else None
        self._teacher: Any = None

    def kl(self, number: int, tokens: int, name: str, kept: Kept) -> float:
        """The KL of a shape after its training in round ``number``, the same on every rank."""
        store = ScoreStore(self._context.folder / "search")
        known = store.numbers(f"round-{number}") if self._ranks.rank == 0 else {}
        if self._ranks.first_says(name in known):
            return self._ranks.number(known.get(name, 0.0))
        student = self._trained(number, tokens, name, kept)
        kl = 0.0
        if self._judge is not None:
            kl = self._judge.kl(student.to(self._model.device))  # pyright: ignore[reportArgumentType] - a device is one
            store.put_numbers(f"round-{number}", {**known, name: kl})
            self._context.say(f"  KL {kl:.4f} after {tokens:,} tokens: {name}")
            # after the figure is written: a kill in between costs disk, the other order would cost the training
            shutil.rmtree(self._folder(number, name), ignore_errors=True)
        return self._ranks.number(kl)

    def _folder(self, number: int, name: str) -> Any:
        return self._context.folder / "search" / f"{number}-{name.replace(',', '-')}"

    def _trained(self, number: int, tokens: int, name: str, kept: Kept) -> "PreTrainedModel":
        context = self._context
        # its steps are no part of the run's curves, and it is judged at its end alone
        run = replace(context.run, metrics=MetricsSink(None), trainer=replace(context.run.trainer, evaluate_every=0))
        inner = replace(
            context,
            run=run,
            name=f"{context.name}: {name}",
            kind="distill",
            folder=self._folder(number, name),
            key=sha256_json([context.key, number, tokens, name]),
        )
        block = DistillSettings(tokens=tokens, teacher="input", learning_rate=self._settings.learning_rate)
        student = OpenStudent(cut(self._model, kept), None, stage_strategy(block, context))
        # one order of windows for all shapes
        steps = derive_steps(
            block,
            run.trainer,
            name=f"{context.name}-search",
            seq_length=run.data.train.seq_length,
            ranks=self._ranks.size,
            seed=run.seed,
        )
        plan = derive_plan(
            block,
            run.trainer,
            steps,
            kind="distill",
            hidden=hidden_size(student.model),
            strategy=student.strategy,
            stage_key=inner.key,
        )
        if self._teacher is None:
            self._teacher = stage_teacher(block, replace(context, run=run), plan)
        return fit_student(student, block, inner, plan, self._teacher).student


def _ranking(settings: PruneSettings, context: StageContext, space: ShapeSpace, cache: ScoreCache, text: Batches) -> ShapeRanking:
    structured = settings.structured
    assert structured is not None
    sizes = sorted(shape.parameters / 1e6 for shape in space.shapes)
    context.say(
        f"  search: {len(sizes):,} aligned shapes within {space.budget.words()}, {sizes[0]:,.2f}M to {sizes[-1]:,.2f}M parameters"
    )  # fmt: skip
    return ShapeRanking(
        cache,
        _windows(text, structured.found_by.windows),
        cache.store,
        score=structured.score or "weight_activation",
        depth_score=structured.depth_score or "block_influence",
        tell=context.say,
    )


def _round(context: StageContext, number: int) -> dict[str, Any]:
    return ScoreStore(context.folder / "search").numbers(f"round-{number}")


def _windows(text: Batches, number: int) -> list[dict[str, torch.Tensor]]:
    """The first windows of the text, in its batches."""
    found: list[dict[str, torch.Tensor]] = []
    for batch in text:
        if (left := number - sum(len(one["input_ids"]) for one in found)) > 0:
            found.append({key: values[:left] for key, values in batch.items()})
    return found
