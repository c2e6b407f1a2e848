"""Scores of a run's models on the tasks of an evaluate stage, each taken once and stored in the run folder."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...models.common.files import sha256_file, sha256_json
from ...models.folder.model_folder import content_hash
from ...trainer.settings import EvaluateSettings
from ...trainer.stages.context import RunContext
from ...trainer.tasks.scoring import TaskChoice, score_tasks
from .installed import installed_version
from .run_folder import RunFolder
from .stored_figures import read_figures, store_figures

Row = dict[str, Any]


def choice_of(settings: EvaluateSettings) -> TaskChoice:
    """The tasks of an evaluate stage."""
    return TaskChoice(
        tasks=settings.tasks,
        shots=settings.task_shots,
        limit=settings.task_limit,
        batch=None if settings.task_batch == "auto" else settings.task_batch,
        seed=settings.task_seed,
    )


class TaskScores:
    """The tasks of one stage (used on rank 0).

    Args:
        run: What all stages share: the held-out text, the console.
        folder: Of the run; scores are kept in ``.measured``.
        settings: Of the stage.
    """

    def __init__(self, run: RunContext, folder: RunFolder, settings: EvaluateSettings) -> None:
        self._run, self._folder, self._choice = run, folder, choice_of(settings)

    def of(self, path: str, revision: str | None, who: str) -> dict[str, Row]:
        """Scores of a model by task, as rows (``TaskScore.row``); each task is asked for once for the same bytes."""
        found: dict[str, Row] = {}
        for task in self._choice.tasks:
            key = sha256_json([content_hash(path, revision), *self._facts(task)])
            file = self._folder.path / ".measured" / f"task-{key[:16]}.json"
            before = read_figures(file)
            if before.get("key") != key:
                with self._run.console.status(f"scoring {who} on {Path(task).name}"):
                    scores = score_tasks(path, replace(self._choice, tasks=(task,)), windows=self._run.data.evaluation, revision=revision)
                before = {"row": {name: score.row() for name, score in scores.items()}}
                store_figures(file, key, before["row"])
            found |= before["row"]
        for name, row in found.items():
            error = "" if row["stderr"] is None else f" ±{row['stderr']:.4f}"
            self._run.say(f"{name}: {row['metric']} of {who} is {row['score']:.4f}{error} over {row['items']:,} items")
        return found

    def _facts(self, task: str) -> list[Any]:
        """What a score depends on, besides the model."""
        one = self._choice
        facts: list[Any] = [task, one.shots, one.limit, one.batch, one.seed]
        if task == "cloze":
            return [*facts, self._run.data.fingerprint]
        if task in one.files:
            return [*facts, sha256_file(Path(task))]
        return [*facts, installed_version("lm_eval"), *map(sha256_file, _files_of(Path(task)))]


def _files_of(task: Path) -> list[Path]:
    """A local YAML task and the local files that stand in it by name."""
    if not task.is_file():
        return []
    words = re.split(r"[\s,\[\]{}\"']+", task.read_text(encoding="utf-8", errors="replace"))
    # a name may stand from the working folder or from the task's own
    places = (place for word in words if word for place in (Path(word), task.parent / word))
    return list(dict.fromkeys([task, *(place for place in places if place.is_file())]))
