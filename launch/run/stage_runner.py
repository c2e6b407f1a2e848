"""Runs the stages of a recipe in order: skips finished ones, resumes interrupted ones, and measures every model."""

from typing import TYPE_CHECKING, Any

from ...models.folder.model_folder import content_hash
from ...models.pruning.zeros_record import sparse_modules
from ...models.teachers import TeacherRef
from ...trainer.evaluation.gates import gate_failures, task_failures
from ...trainer.soft_targets.store import FORMAT as CACHE_FORMAT
from ...trainer.stages.context import RunContext, StageContext, StageResult
from ...trainer.stages.registry import stage_kind
from .changes import change_between
from .report_rows import ReportRows
from .run_folder import RunFolder, StageFolder
from .session import Session
from .stage_key import parts_of, stage_key

if TYPE_CHECKING:
    from ...configs.recipe import StageEntry


class StageRunner:
    """The stages of one start of a run, on this rank.

    Args:
        run: What all stages share.
        folder: The run folder.
        session: The session of this start.
        record: The record of origin for every model folder of the run.
        rows: Collects the figures of each model.
    """

    def __init__(self, run: RunContext, folder: RunFolder, session: Session, record: dict[str, Any], rows: ReportRows) -> None:
        self._run = run
        self._folder = folder
        self._session = session
        self._record = record
        self._rows = rows

    def run(self, entry: "StageEntry", at: dict[str, Any]) -> dict[str, Any]:
        """Run one stage on the model folder ``at``; returns where the next stage starts (``path`` and ``revision``)."""
        work = stage_kind(entry.kind, entry.settings).load()
        folder = self._folder.stage(entry.name)
        # evaluate makes nothing, so it needs no folder, no key and no resuming
        if (finish := work.finish) is None:
            self._session.on_first(lambda: self._rows.start_row(entry, at))
            return at
        begun = self._session.on_first(lambda: self._begin(entry, at, folder))
        if begun["done"]:
            self._run.say(f"{entry.name} is done, skipped")
        else:
            self._run.say(entry.name, style="bold")
            context = StageContext(
                run=self._run,
                name=entry.name,
                kind=entry.kind,
                folder=folder.path,
                key=begun["key"],
                input=at["path"],
                input_revision=at["revision"],
                record={**self._record, "parent": begun["input"]},
            )
            # three steps with a wait between them: rank 0 prepares, all ranks train, rank 0 writes
            if (first := work.start) is not None:
                self._session.on_first(lambda: first(entry.settings, context))
            # outside ``on_first``: collectives need all ranks
            trained = work.train(entry.settings, context) if work.train else None
            self._session.on_first(lambda: self._close(entry, folder, begun, finish(entry.settings, context, trained)))
        # also for a skipped stage: its figures are remembered in its folder, or measured now if they are not
        makes_model = self._session.on_first(lambda: self._rows.stage_row(entry, folder))
        return {"path": str(folder.model), "revision": None} if makes_model else at

    def judge(self, entry: "StageEntry") -> list[str]:
        """Return a sentence for each gate of an evaluate stage that the model fails, the same on every rank; [] for other stages."""
        if entry.kind != "evaluate":
            return []

        def judge() -> list[str]:
            rows = self._rows.stages
            # the last row is that of this stage; the teacher's, if there is one, is the first
            teacher = rows[0] if rows[0]["kind"] == "teacher" else None
            error = (change_between(teacher, rows[-1]) or {}).get("perplexity_se")
            failed = gate_failures(entry.settings, rows[-1]["eval"], teacher and teacher["eval"], increase_se=error)
            failed += task_failures(entry.settings.min_task, rows[-1].get("tasks", {}), teacher and teacher.get("tasks"))
            return [f"{entry.name}: {sentence}" for sentence in failed]

        return self._session.on_first(judge)

    def _begin(self, entry: "StageEntry", at: dict[str, Any], folder: StageFolder) -> dict[str, Any]:
        """Open the stage's folder (rank 0): its key, the hash of its input, and whether it is done."""
        source = content_hash(at["path"], at["revision"])
        key = stage_key(
            name=entry.name,
            kind=entry.kind,
            settings=entry.settings,
            format_version=stage_kind(entry.kind, entry.settings).format_version,
            input_hash=source,
            data=self._run.data.fingerprint,
            teacher=_teacher_key(self._run.teacher),
            trainer=self._run.trainer,
            seed=self._run.seed,
            sparse=sparse_modules(at["path"], at["revision"]),
        )
        state = folder.begin(key, entry.kind)
        return {"key": key, "input": source, "done": state.get("state") == "done"}

    @staticmethod
    def _close(entry: "StageEntry", folder: StageFolder, begun: dict[str, Any], result: StageResult) -> None:
        """Write that the stage is done (rank 0)."""
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
                **({"parts": used} if (used := [part.identity() for part in parts_of(entry.settings)]) else {}),
                **result.facts,
            }
        )
        # after the state is written: a kill in between costs disk, the other order would cost the training. The checkpoint of a qat stage
        # that its model is made of holds what the model folder rounds away
        folder.drop_checkpoints(keep=1 if entry.kind == "qat" else 0, step=(result.facts.get("held_out") or {}).get("model_step"))


def _teacher_key(teacher: TeacherRef | None) -> str | None:
    """Return the teacher's settings that change numbers."""
    if teacher is None:
        return None
    # a cache or a server gives only a part of each distribution, which changes the numbers; its path or address does not
    kept = f":{teacher.cache.mode}:{teacher.cache.states or teacher.cache.tokens}:{CACHE_FORMAT}" if teacher.cache else ""
    kept += f":served:{teacher.served.model}:{teacher.served.tokens}" if teacher.served else ""
    return f"{teacher.content}:{teacher.load_in}{kept}"
