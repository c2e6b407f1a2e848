"""Runs a recipe: opens its inputs, runs its stages, and writes the report at the end."""

import contextlib
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.errors import GateFailed, UserError
from ...models.common.locks import Lock
from ...models.folder.hub import model_name
from ...models.settings import CacheSettings, ServedSettings
from ...models.teachers import TeacherRef
from ...trainer.loop.metrics import MetricsSink
from ...trainer.processes.world import World
from ...trainer.progress import print_line
from ...trainer.stages.context import RunContext
from ...trainer.stages.training import fill_cache
from ...trainer.trackers.build import build_trackers, finish_trackers
from ...trainer.trackers.tracker import Tracker
from ..report.tables import WIDE, terminal_table
from .adapters import with_adapters
from .changes import learns_from_teacher
from .kept_split import kept_words, with_split
from .left_out import left_out_of, left_out_words
from .origin import imported_of, origin_words, teacher_adapter_of
from .outcome import forget_run_outcome, note_outcome
from .report_rows import ReportRows
from .run_folder import PARTS, RunFolder, versions
from .scratch_training import train_scratch_teacher
from .session import Session
from .stage_runner import StageRunner
from .starting_point import RunInputs, make_student, open_origin, teacher_ref

if TYPE_CHECKING:
    from ...configs.recipe import Recipe


class Runner:
    """One start of a recipe on this rank."""

    def __init__(self, recipe: "Recipe", run_dir: Path, world: World, *, quiet: bool = False) -> None:
        from ...configs.recipe import resolved
        from ..terminal.console import CleanConsole

        self.asked = recipe
        self.recipe = with_split(recipe, run_dir)
        self.plain = resolved(self.recipe, [f"{PARTS}/{file.copy_name}" for file in self.recipe.imports])
        """The recipe with every default filled in, as plain data."""
        self.folder = RunFolder(run_dir)
        self.world = world
        self.console = CleanConsole(quiet=quiet or not world.is_first)
        if not self.console.is_terminal:
            # a log file has no width of its own
            self.console.width = max(self.console.width, WIDE)
        self.session = Session(world, run_dir)
        self._lock: Lock | None = None
        # looked up before the first status file, which makes the folder
        self._missing = self.folder.highest_missing()
        self._made: Path | None = None
        """The highest folder that this start has made, on rank 0; None if the run folder was there."""
        self._trackers: list[Tracker] = []

    def run(self) -> dict[str, Any]:
        """Run every stage and write the report. A failed gate ends the run early: GateFailed is raised after the report is written."""
        try:
            return self._run()
        except BaseException as error:
            if self._lock is not None:
                note_outcome(self.folder.path, error)
            # what a tracker raises here would hide why the run ended
            with contextlib.suppress(Exception):
                self._end_trackers(1)
            raise
        finally:
            self._unlock()

    def _run(self) -> dict[str, Any]:
        started = time.perf_counter()
        run = self._open()
        # every model folder of the run carries this record, so it is made before the first one
        record = self._record(run)
        at = self.session.on_first(lambda: make_student(self.recipe, run, self.folder.stage("00-student"), record))
        rows = ReportRows(self.recipe, run, self.folder)
        # said before training: a teacher that lost too much by rounding is better replaced now than after hours
        if any(learns_from_teacher(entry) for entry in self.recipe.stages):
            self.session.on_first(rows.teacher_drift)
        failed: list[str] = []
        left = [entry.name for entry in self.recipe.stages]
        self.session.on_first(lambda: rows.first_row(at))
        stages = StageRunner(run, self.folder, self.session, record, rows)
        for entry in self.recipe.stages:
            # what remains is what a failed gate leaves out; stages after it would only build on a model that is not wanted
            del left[0]
            at = stages.run(entry, at)
            if failed := stages.judge(entry):
                break
        # also after a failed gate: the report shows why it failed
        report = self.session.on_first(lambda: self._finish(run, rows, at, time.perf_counter() - started, failed))
        # before the processes leave: a tracker uploads in the background, and ``leave`` waits for no thread
        self._end_trackers(GateFailed.exit_code if failed else 0)
        self.session.close(GateFailed.exit_code if failed else 0)
        if failed:
            after = f". Not run: {', '.join(left)}. Finished stages are kept and skipped when the recipe runs again" if left else ""
            # raised last, when report, curves and status files are written: the exit code is all that is different
            raise GateFailed(f"the model is worse than the recipe allows: {'; '.join(failed)}{after}")
        return report

    def fill_caches(self) -> None:
        """Compute the teacher's predictions that the stages will need, and stop."""
        try:
            run = self._open()
            for entry in self.recipe.stages:
                if learns_from_teacher(entry):
                    run.say(entry.name, style="bold")
                    fill_cache(entry.settings, run, entry.name)
            self.session.close()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _open(self) -> RunContext:
        """Make the run folder, train a scratch teacher if there is one, and return what the stages share."""
        import yaml

        self.session.on_first(lambda: self._enter(yaml.safe_dump(self.plain, sort_keys=False, allow_unicode=True)))
        self._say(f"{self.recipe.name} -> {self.folder.path}", style="bold")
        try:
            # all that follows sees plain model folders
            self.recipe = with_adapters(self.recipe, self.session)
            inputs = open_origin(self.recipe, self.session)
        except UserError:
            # an input that cannot be opened leaves no folder behind; one that was there before keeps its finished stages
            self._discard()
            raise
        self.session.removes = False
        self._say(f"text: {inputs.data.description}")
        for reason, count in inputs.data.left_out.items():
            # some are left out, others only read in another way: the reason says which
            self._say(f"  of it: {count:,} {reason}")
        if kept := kept_words(self.recipe, self.asked, inputs.data.description):
            self._say(kept)
        if inputs.note:
            self._say(f"vocabulary: {inputs.note}")
        run = RunContext(
            data=inputs.data,
            tokenizer=inputs.tokenizer,
            v_eff=inputs.v_eff,
            trainer=self.recipe.trainer,
            seed=self.recipe.seed,
            teacher=None,
            metrics=self._open_metrics(),
            console=self.console,
        )
        # the teacher is trained by the run's own context, which has no teacher yet, and is put into it afterwards
        if inputs.scratch:
            train_scratch_teacher(self.recipe, inputs.scratch, run, self.session)
        return replace(run, teacher=self._teacher(inputs))

    def _enter(self, recipe_text: str) -> None:
        """Create and lock the run folder (rank 0)."""
        self._lock = self.folder.lock(self._say)
        # from here on the folder is this start's; one that another start made meanwhile was refused
        self._made = self._missing
        self.session.removes = self._made is not None
        try:
            self.folder.open(recipe_text, {file.copy_name: file.source for file in self.recipe.imports})
        except UserError:
            self._discard()
            raise
        forget_run_outcome(self.folder.path)

    def _discard(self) -> None:
        """Remove the folders that this start has made (rank 0)."""
        if self._made is not None:
            self.session.wait_for_farewells()
            self.folder.discard(self._made)
            self._made = None

    def _say(self, text: str, style: str = "") -> None:
        print_line(self.console, text, style)

    def _record(self, run: RunContext) -> dict[str, Any]:
        """Return the record of origin for every model folder of this run."""
        record: dict[str, Any] = {"base_model": run.teacher.name if run.teacher else self._student_name(), "run": self.recipe.name}
        if imported := self.session.on_first(lambda: imported_of(self.recipe)):
            record["imported"] = imported
            self._say(origin_words(imported))
        if adapter := self.session.on_first(lambda: teacher_adapter_of(self.asked, self.recipe)):
            record["teacher_imported"] = adapter
            self._say(f"teacher: {origin_words(adapter)}")
        if left_out := self.session.on_first(lambda: left_out_of(self.recipe)):
            record["left_out"] = left_out
            self._say(f"{left_out_words(left_out)} (such as heads that predict further tokens; no stage copies them)")
        return record

    def _student_name(self) -> str:
        path = self.recipe.student.path
        return model_name(path) if path else "random weights"

    def _open_metrics(self) -> MetricsSink:
        # one writer per file: the other ranks compute the same curves and log nothing
        if not self.world.is_first:
            return MetricsSink(None)
        where = self.folder.path
        self._trackers = build_trackers(self.recipe.logger, where, name=self.recipe.name, config=self.plain, console=self.console)
        return MetricsSink(self.folder.metrics, self._trackers)

    def _end_trackers(self, exit_code: int) -> None:
        # once: a failed gate is raised after the trackers have ended
        trackers, self._trackers = self._trackers, []
        finish_trackers(trackers, exit_code=exit_code)

    def _teacher(self, inputs: RunInputs) -> TeacherRef | None:
        # the hash of the teacher's files is computed once; the other ranks get it as JSON, so the nested dataclasses are built again here
        told = self.session.on_first(lambda: (ref := teacher_ref(self.recipe, inputs.scratch)) and asdict(ref))
        if not told:
            return None
        cache, served = told.pop("cache"), told.pop("served")
        return TeacherRef(**told, cache=CacheSettings(**cache) if cache else None, served=ServedSettings(**served) if served else None)

    def _finish(self, run: RunContext, rows: ReportRows, at: dict[str, Any], seconds: float, failed: list[str]) -> dict[str, Any]:
        from ..report.build import build_report, write_report
        from ..report.tables import duration
        from .publish import publish

        report = build_report(
            name=self.recipe.name,
            versions=versions(),
            protocol=rows.protocol(),
            recipe=self.plain,
            stages=rows.stages,
            baselines=rows.baselines(),
            exports=rows.exports,
            gates=failed,
            notes=rows.notes,
            samples=rows.samples(at),
        )
        written = write_report(report, self.folder.path)
        publish(report, self.folder, run.metrics)
        self.console.print(terminal_table(report, self.console.width))
        self._say(f"{'stopped at a gate' if failed else 'finished'} in {duration(seconds)}; report: {written[-1]}")
        return report
