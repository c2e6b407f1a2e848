"""Checks before any work that tasks exist and can be opened."""

from typing import Any

from ...models.common.errors import UserError
from ...trainer.settings import EvaluateSettings
from .task_scores import choice_of


def check_tasks(settings: EvaluateSettings) -> None:
    """Open every task of an evaluate stage.

    Raises:
        UserError: a task is unknown (the message has the nearest name), needs a package or a hub that is not there, or a gate names none.
    """
    from ...configs.problems import did_you_mean
    from ...trainer.tasks.scoring import check_choice, unknown_tasks

    if not settings.tasks:
        return
    unknown, known = unknown_tasks(settings.tasks)
    if unknown:
        raise UserError(
            f"unknown task {unknown[0]!r}{did_you_mean(unknown[0], known) or ';'} tasks are 'cloze', files of questions and answers "
            "(.jsonl), YAML files of tasks, and the names that `lm-eval ls tasks` lists"
        )
    names = check_choice(choice_of(settings))
    wrong: Any = next((task for task in settings.min_task or {} if task not in names), None)
    if wrong is not None:
        raise UserError(f"min_task names {wrong!r}, which is not scored{did_you_mean(wrong, names) or ';'} scored are {', '.join(names)}")
