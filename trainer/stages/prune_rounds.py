"""Stage `prune` in rounds: cut a little, distil, and again. What is finished lies in ``rounds/`` of its folder until the stage is done."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...models.axis_map import AXES, WIDTHS, Axis, Family
from ...models.common.files import sha256_json
from ...models.family_map import family_of
from ...models.folder.loading import load_config
from ...models.folder.model_folder import read_record
from ...models.outline import outline_of
from ...models.pruning.kept import Kept
from ...models.pruning.kept_record import ROOT, kept_of
from ...models.pruning.ranks import Ranks
from ...models.pruning.score_store import ScoreStore
from ...models.shape_rounds import Round, rounds_to
from ...models.sizes import Sizes, sizes_of
from ..processes.world import connect, current_world, sum_over_ranks
from ..settings_pruning import PruneSettings
from ..soft_targets.cached import knows_given_text_alone
from .context import StageContext, StageResult, Trained
from .prune_structured import prune_structured
from .saving import CARRIED, save_student, save_trained
from .score_caches import score_together
from .student_and_teacher import open_student, stage_teacher
from .training import fit_student, training_plan, training_steps
from .zeros import input_record, keep_zeros_hooks, tell_unlisted_zeros

_POLL_SECONDS = 0.2


def train_rounds(settings: PruneSettings, context: StageContext) -> Trained:
    """Cut and distil in rounds (all ranks); the student of the last round is the result. A killed stage goes on in its round."""
    rounds = _Rounds.of(settings, context)
    world = current_world()
    connect(world)
    # the first process sees the folder as it is, and the others follow it
    ranks = Ranks(world.rank, world.size, sum_over_ranks)
    last = len(rounds.rounds) - 1
    done = [number for number in range(last) if ranks.first_says(rounds.ends(number).model.exists())]
    teacher: Any = None
    for number in range(max(done, default=-1) + 1, last):
        trained, teacher = rounds.distilled(number, teacher)
        if world.is_first:
            rounds.keep(number, trained)
    return rounds.distilled(last, teacher)[0]


def finish_rounds(settings: PruneSettings, context: StageContext, trained: Trained) -> StageResult:
    """Write the student of the last round, with the indices that are left of the stage's input (rank 0)."""
    rounds = _Rounds.of(settings, context)
    figures = rounds.figures(trained)
    told = {"rounds": [{name: value for name, value in one.items() if name != "kept"} for one in figures]}
    last = rounds.cuts(len(figures) - 1).model
    kept = rounds.kept([one["kept"] for one in figures])
    facts = {
        "kept": kept.record(rounds.family, rounds.before.layers),
        "parent_shape": rounds.before.record(),
        ROOT: read_record(last)[ROOT],
        CARRIED: input_record(rounds.ends(len(figures) - 1)),
        **told,
    }
    result = save_trained(replace(trained, facts={**trained.facts, **facts}), context)
    assert settings.structured is not None
    share = rounds.family.cut_share(rounds.matrices, settings.structured.axes)
    result.tokens, result.seconds = (sum(one[name] for one in figures) for name in ("tokens", "seconds"))
    result.facts |= {"coverage": {"share": share, "left": {}}, **told}
    return result


@dataclass(frozen=True)
class _Rounds:
    """The rounds of one stage."""

    settings: PruneSettings
    context: StageContext
    family: Family
    before: Sizes
    matrices: dict[str, int]
    """Numbers in the matrices of the stage's input."""
    rounds: Sequence[Round]

    @classmethod
    def of(cls, settings: PruneSettings, context: StageContext) -> "_Rounds":
        """From the config of the stage's input; refuses a shape that no model of the family has."""
        structured = settings.structured
        assert structured is not None and structured.rounds is not None
        config = load_config(context.input, revision=context.input_revision)
        family, tensors = family_of(config), outline_of(config).tensors
        rounds = rounds_to(config, family, tensors, structured.kept, structured.rounds)
        matrices = {name: shape[0] * shape[1] for name, shape in tensors.items() if len(shape) == 2}
        return cls(settings, context, family, sizes_of(config, family), matrices, rounds)

    def cuts(self, number: int) -> StageContext:
        """Where a round cuts."""
        place, revision = (str(self.ends(number - 1).model), None) if number else (self.context.input, self.context.input_revision)
        # scores of what a round has made serve no other cut
        scores = self._folder(number, "cut") / "scores" if number else None
        return self._inner(number, "cut", input=place, input_revision=revision, scores=scores)

    def ends(self, number: int) -> StageContext:
        """Where a round distils."""
        name = f"{self.context.name}-round-{number + 1}"
        return self._inner(number, "distilled", input=str(self._folder(number, "cut") / "model"), input_revision=None, name=name)

    def distilled(self, number: int, teacher: Any) -> tuple[Trained, Any]:
        """Cuts, unless that is done, and distils (all ranks); returns the teacher too, which the next round may use."""
        one, context = self.rounds[number], self.ends(number)
        count, shape = len(self.rounds), one.words(self._start(number))
        self.context.say(f"  round {number + 1} of {count}: {shape}, {one.share:.1%} of the decoder layers' parameters")
        self._cut(number)
        # the steps of all rounds together are those of the plan, unless that leaves a round without one
        total = max(count, training_steps(self.settings, self.context.run, self.context.name).total_steps)
        settings = replace(self.settings, tokens=None, steps=total * (number + 1) // count - total * number // count)
        student = open_student(settings, context)
        tell_unlisted_zeros(context, student.model)
        plan = training_plan(settings, context, student)
        # a cached teacher knows the windows of one round; the input of the stage teaches all rounds, not that of the round
        if teacher is None or knows_given_text_alone(teacher):
            teacher = stage_teacher(settings, self.context, plan)
        hooks = keep_zeros_hooks(context, student.model)
        return fit_student(student, settings, context, plan, teacher, hooks), teacher

    def keep(self, number: int, trained: Trained) -> None:
        """Writes what a round has made (rank 0), and drops what is no longer needed."""
        context = self.ends(number)
        # before the folder, which says that the round is done
        self._store.put_numbers(f"round-{number + 1}", self._figures(number, trained))
        save_student(trained.student, context, {})
        unused = [self._folder(number, "cut"), *([self._folder(number - 1, "distilled")] if number else []), context.folder / "checkpoints"]
        for folder in unused:
            shutil.rmtree(folder, ignore_errors=True)

    def figures(self, trained: Trained) -> list[dict[str, Any]]:
        """What is known of each round, the last one included."""
        last = len(self.rounds) - 1
        return [*(self._store.numbers(f"round-{number + 1}") for number in range(last)), self._figures(last, trained)]

    def kept(self, records: Sequence[dict[str, Any]]) -> Kept:
        """What all cuts together keep of the stage's input, of what each keeps of its own."""
        total: Kept | None = None
        for number, record in enumerate(records):
            kept = kept_of(record, self.family, self._start(number).layers)
            assert kept is not None, "the stage has written it"
            total = kept if total is None else kept.of_root(total)
        assert total is not None
        return total

    def _figures(self, number: int, trained: Trained) -> dict[str, Any]:
        one, record = self.rounds[number], read_record(self.cuts(number).model)
        told = {"shape": one.words(self._start(number)), "share": one.share, "tokens": trained.tokens, "seconds": trained.seconds}
        return {**told, "repairs": record.get("repairs", []), "kept": record["kept"]}

    def _cut(self, number: int) -> None:
        context, world = self.cuts(number), current_world()
        ranks = Ranks(world.rank, world.size, sum_over_ranks)
        if not ranks.first_says(context.model.exists()):
            settings = self._cut_settings(number)
            _wait_for(Path(context.input), anywhere=number == 0)
            score_together(settings, context)
            if world.is_first:
                prune_structured(settings, context)
        _wait_for(context.model)

    def _cut_settings(self, number: int) -> PruneSettings:
        kept = self.rounds[number].kept(self._start(number))
        structured = self.settings.structured
        assert structured is not None
        widths = any(axis in kept for axis in WIDTHS)
        # a round may leave axes as they are, and then has nothing to score or repair there
        cut: dict[Axis, int | None] = {axis: kept.get(axis) for axis in AXES}
        one = replace(
            structured,
            **cut,
            rounds=None,
            score=structured.score if widths else None,
            depth_score=structured.depth_score if "layers" in kept else None,
            repair=structured.repair and widths,
        )
        return PruneSettings(structured=one, calibration_tokens=self.settings.calibration_tokens)

    def _start(self, number: int) -> Sizes:
        return self.rounds[number - 1].sizes if number else self.before

    def _folder(self, number: int, what: str) -> Path:
        return self.context.folder / "rounds" / f"{number + 1}-{what}"

    def _inner(self, number: int, what: str, **changes: Any) -> StageContext:
        # fp32, so that nothing is rounded between rounds
        run = replace(self.context.run, trainer=replace(self.context.run.trainer, save_dtype="fp32"))
        key = sha256_json([self.context.key, number, what])
        return replace(self.context, run=run, folder=self._folder(number, what), key=key, **changes)

    @property
    def _store(self) -> ScoreStore:
        return ScoreStore(self.context.folder / "rounds")


def _wait_for(folder: Path, *, anywhere: bool = False) -> None:
    """Waits for a model folder that the first process writes; of a stage's input, which may be a hub id, nothing is waited for."""
    while not anywhere and not folder.exists():
        # the first process scores, cuts and writes: waiting in a collective could time out
        time.sleep(_POLL_SECONDS)
