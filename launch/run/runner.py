"""Runs a recipe: each stage in order, done ones skipped, broken ones resumed, every model measured, a report at the end."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.errors import GateFailed, UserError
from ...models.common.locks import Lock
from ...models.folder.model_folder import content_hash
from ...models.pruning.zeros_record import sparse_modules
from ...models.settings import CacheSettings, ServedSettings
from ...trainer.evaluation.gates import gate_failures
from ...trainer.loop.loggers import build_loggers, finish_loggers
from ...trainer.loop.metrics import MetricsSink
from ...trainer.processes.world import World
from ...trainer.soft_targets.store import FORMAT as CACHE_FORMAT
from ...trainer.stages.context import StageContext, TeacherRef
from ...trainer.stages.registry import STAGE_KINDS
from ...trainer.stages.training import fill_cache
from ..report.tables import WIDE, terminal_table
from .changes import learns_from_teacher
from .left_out import left_out_of, left_out_words
from .report_rows import ReportRows
from .run_folder import RunFolder, StageFolder, versions
from .scratch_training import train_scratch_teacher
from .session import Session
from .stage_key import stage_key
from .starting_point import RunInputs, make_student, open_origin, teacher_ref

if TYPE_CHECKING:
    from ...configs.recipe import Recipe, StageEntry


class Runner:
    """One start of a recipe on this rank."""

    def __init__(self, recipe: "Recipe", run_dir: Path, world: World) -> None:
        from ..terminal.console import CleanConsole

        self.recipe = recipe
        self.folder = RunFolder(run_dir)
        self.world = world
        self.console = CleanConsole(quiet=not world.is_first)
        if not self.console.is_terminal:
            # a log file has no width of its own
            self.console.width = max(self.console.width, WIDE)
        self.session = Session(world, run_dir)
        self._lock: Lock | None = None

    def run(self) -> dict[str, Any]:
        """Run every stage and write the report. A gate that is not met ends the run where it stands: GateFailed after the report."""
        try:
            return self._run()
        finally:
            self._unlock()

    def _run(self) -> dict[str, Any]:
        started = time.perf_counter()
        plain, origin, teacher = self._open()
        record: dict[str, Any] = {"base_model": teacher.name if teacher else self._student_name(), "run": self.recipe.name}
        if left_out := self.session.on_first(lambda: left_out_of(self.recipe)):
            record["left_out"] = left_out
            self._say(f"{left_out_words(left_out)} (heads that predict further tokens and the like; no stage carries them on)")
        at = self.session.on_first(lambda: make_student(self.recipe, origin, teacher, self.folder.stage("00-student"), record))
        measuring = ReportRows(self.recipe, origin, teacher, self.folder, self.console)
        if any(learns_from_teacher(entry) for entry in self.recipe.stages):
            self.session.on_first(measuring.teacher_drift)
        failed: list[str] = []
        left = [entry.name for entry in self.recipe.stages]
        self.session.on_first(lambda: measuring.first_row(at))
        for entry in self.recipe.stages:
            del left[0]
            at = self._run_stage(entry, at, origin, teacher, record, measuring)
            if failed := self._judge(entry, measuring):
                break
        report = self.session.on_first(lambda: self._finish(measuring, plain, time.perf_counter() - started, failed))
        finish_loggers(self.metrics.loggers)
        self.session.close(GateFailed.exit_code if failed else 0)
        if failed:
            after = f". Not run: {', '.join(left)}. What is done is kept and skipped when the recipe runs again" if left else ""
            raise GateFailed(f"the model is worse than the recipe allows: {'; '.join(failed)}{after}")
        return report

    def fill_caches(self) -> None:
        """Let the teacher predict what the stages will need, and stop there."""
        try:
            _, origin, teacher = self._open()
            for entry in self.recipe.stages:
                if learns_from_teacher(entry):
                    self._say(entry.name, style="bold")
                    fill_cache(entry.settings, self._context(entry, origin, teacher))
            self.session.close()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _open(self) -> tuple[dict[str, Any], RunInputs, TeacherRef | None]:
        """(resolved recipe, text and tokenizer, teacher), the folder made, a scratch teacher trained."""
        import yaml

        from ...configs.recipe import resolved

        plain = resolved(self.recipe)
        new = self.session.on_first(lambda: self._enter(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)))
        self._say(f"{self.recipe.name} -> {self.folder.path}", style="bold")
        try:
            origin = open_origin(self.recipe, self.session)
        except UserError:
            if new and self.world.is_first:
                self.folder.discard()
            raise
        self._say(f"text: {origin.data.description}")
        for reason, count in origin.data.left_out.items():
            self._say(f"  not used: {count:,} {reason}")
        if origin.note:
            self._say(f"vocabulary: {origin.note}")
        self.metrics = self._open_metrics(plain)
        if origin.scratch:
            train_scratch_teacher(self.recipe, origin, self.session, self.metrics, self.console)
        return plain, origin, self._teacher(origin)

    def _enter(self, recipe_text: str) -> bool:
        """Make the run folder this run's own (rank 0); whether it was not there before."""
        new = not self.folder.path.exists()
        self._lock = self.folder.lock(self._say)
        self.folder.open(recipe_text)
        return new

    def _say(self, text: str, style: str = "") -> None:
        # File names and recipe names may hold what rich takes for markup.
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _student_name(self) -> str:
        path = self.recipe.student.path
        return (Path(path).name if Path(path).is_dir() else path) if path else "random weights"

    def _open_metrics(self, plain: dict[str, Any]) -> MetricsSink:
        if not self.world.is_first:
            return MetricsSink(None)
        loggers = build_loggers(self.recipe.logger, self.folder.path, name=self.recipe.name, config=plain, console=self.console)
        return MetricsSink(self.folder.metrics, loggers)

    def _teacher(self, origin: RunInputs) -> TeacherRef | None:
        told = self.session.on_first(lambda: (ref := teacher_ref(self.recipe, origin.scratch)) and asdict(ref))
        if not told:
            return None
        cache, served = told.pop("cache"), told.pop("served")
        return TeacherRef(**told, cache=CacheSettings(**cache) if cache else None, served=ServedSettings(**served) if served else None)

    def _run_stage(
        self,
        entry: "StageEntry",
        at: dict[str, Any],
        origin: RunInputs,
        teacher: TeacherRef | None,
        record: dict[str, Any],
        measuring: ReportRows,
    ) -> dict[str, Any]:
        """Run one stage on the model folder ``at``; returns where the next stage starts."""
        kind = STAGE_KINDS[entry.kind]
        work = kind.load()
        folder = self.folder.stage(entry.name)
        if work.finish is None:
            self.session.on_first(lambda: measuring.start_row(entry, at))
            return at
        begun = self.session.on_first(lambda: self._begin(entry, at, origin, teacher, folder))
        context = self._context(entry, origin, teacher, at, {**record, "parent": begun["input"]}, begun["key"])
        if not begun["done"]:
            self._say(entry.name, style="bold")
            if (first := work.start) is not None:
                self.session.on_first(lambda: first(entry.settings, context))
            trained = work.train(entry.settings, context) if work.train else None
            finish = work.finish
            self.session.on_first(lambda: self._close_stage(entry, folder, begun, finish(entry.settings, context, trained)))
        else:
            self._say(f"{entry.name} is done, skipped")
        after = self.session.on_first(lambda: measuring.stage_row(entry, folder))
        return {"path": str(folder.model), "revision": None} if after else at

    def _context(
        self,
        entry: "StageEntry",
        origin: RunInputs,
        teacher: TeacherRef | None,
        at: dict[str, Any] | None = None,
        record: dict[str, Any] | None = None,
        key: str = "",
    ) -> StageContext:
        return StageContext(
            name=entry.name,
            kind=entry.kind,
            folder=self.folder.stage(entry.name).path,
            input=at["path"] if at else "",
            input_revision=at["revision"] if at else None,
            record=record or {},
            teacher=teacher,
            data=origin.data,
            tokenizer=origin.tokenizer,
            v_eff=origin.v_eff,
            trainer=self.recipe.trainer,
            seed=self.recipe.seed,
            key=key,
            metrics=self.metrics,
            console=self.console,
        )

    def _begin(
        self, entry: "StageEntry", at: dict[str, Any], origin: RunInputs, teacher: TeacherRef | None, folder: StageFolder
    ) -> dict[str, Any]:
        source = content_hash(at["path"], at["revision"])
        key = stage_key(
            name=entry.name,
            kind=entry.kind,
            settings=entry.settings,
            format_version=STAGE_KINDS[entry.kind].format_version,
            input_hash=source,
            data=origin.data.fingerprint,
            teacher=_teacher_key(teacher),
            trainer=self.recipe.trainer,
            seed=self.recipe.seed,
            sparse=sparse_modules(at["path"], at["revision"]),
        )
        state = folder.begin(key, entry.kind)
        return {"key": key, "input": source, "done": state.get("state") == "done"}

    def _close_stage(self, entry: "StageEntry", folder: StageFolder, begun: dict[str, Any], result: Any) -> None:
        folder.write(
            {
                "key": begun["key"],
                "kind": entry.kind,
                "state": "done",
                "input": begun["input"],
                "makes_model": result.model is not None,
                "tokens": result.tokens,
                "seconds": result.seconds,
                "exports": result.exports,
                **result.facts,
            }
        )
        folder.drop_checkpoints(keep=1 if entry.kind == "qat" else 0)

    def _finish(self, measuring: ReportRows, plain: dict[str, Any], seconds: float, failed: list[str]) -> dict[str, Any]:
        from ..report.build import build_report, write_report
        from ..report.tables import duration
        from .publish import publish

        report = build_report(
            name=self.recipe.name,
            versions=versions(),
            protocol=measuring.protocol(),
            recipe=plain,
            stages=measuring.stages,
            baselines=measuring.baselines(),
            exports=measuring.exports,
            gates=failed,
            notes=measuring.notes,
        )
        written = write_report(report, self.folder.path)
        publish(report, self.folder, self.metrics)
        self.console.print(terminal_table(report, self.console.width))
        self._say(f"{'stopped at a gate' if failed else 'finished'} in {duration(seconds)}; report: {written[-1]}")
        return report

    def _judge(self, entry: "StageEntry", measuring: ReportRows) -> list[str]:
        """Sentences about the gates of an evaluate stage that its model does not meet, the same on every rank; [] for other stages."""
        if entry.kind != "evaluate":
            return []

        def judge() -> list[str]:
            rows = measuring.stages
            teacher = rows[0]["eval"] if rows[0]["kind"] == "teacher" else None
            return [f"{entry.name}: {sentence}" for sentence in gate_failures(entry.settings, rows[-1]["eval"], teacher)]

        return self.session.on_first(judge)


def _teacher_key(teacher: TeacherRef | None) -> str | None:
    """What of the teacher changes numbers."""
    if teacher is None:
        return None
    kept = f":{teacher.cache.mode}:{teacher.cache.tokens}:{CACHE_FORMAT}" if teacher.cache else ""
    kept += f":served:{teacher.served.model}:{teacher.served.tokens}" if teacher.served else ""
    return f"{teacher.content}:{teacher.load_in}{kept}"
