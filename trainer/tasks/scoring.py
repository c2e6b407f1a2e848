"""Scores a model folder, a quantized folder or an export on tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.common.errors import UserError
from ...models.folder.loading import load_tokenizer
from ..evaluation.model_row import best_device, open_for_measuring
from . import answers, cloze, harness
from .language_model import LanguageModel
from .score import TaskScore

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.windows import Windows


@dataclass(frozen=True, kw_only=True)
class TaskChoice:
    """Tasks, and how they are scored."""

    tasks: tuple[str, ...]
    """``cloze``, files of questions and answers (.jsonl), and names or YAML files of lm-eval."""
    shots: int | None = None
    """Solved examples before each item; None = each task's own number."""
    limit: int | None = None
    """Items of each task at most; None = all."""
    batch: int | None = None
    """Sequences per forward pass; None = as many as fit into 4,096 tokens."""
    seed: int = 0
    """Seed of the choice of items and examples."""

    @property
    def files(self) -> list[str]:
        """Files of questions and answers."""
        return [task for task in self.tasks if task.endswith(answers.SUFFIXES)]

    @property
    def of_harness(self) -> list[str]:
        """What lm-eval scores."""
        return [task for task in self.tasks if task != cloze.NAME and task not in self.files]


def check_choice(choice: TaskChoice) -> list[str]:
    """Names that will have a score, in order; opens every task, so that what is wrong shows before anything long begins.

    Raises:
        UserError: a task cannot be opened, or two have the same name.
    """
    for file in choice.files:
        answers.check_questions(file, choice.shots)
    opened = harness.open_tasks(choice.of_harness).names if choice.of_harness else []
    names = [cloze.NAME] * (cloze.NAME in choice.tasks) + [Path(file).stem for file in choice.files] + opened
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"two tasks have the name {twice}; rename a file, or give each task once")
    return names


def score_tasks(
    path: str,
    choice: TaskChoice,
    *,
    windows: "Windows | None" = None,
    revision: str | None = None,
    device: str | None = None,
) -> dict[str, TaskScore]:
    """Scores of the model in ``path``, by the name of the task.

    Args:
        path: Model folder, quantized folder, export, GGUF file or hub id; opened as every measurement opens it, in fp32.
        choice: The tasks.
        windows: Held-out text in the model's tokens, for ``cloze``.
        revision: Hub revision.
        device: Device to compute on; None = a GPU if there is one.

    Raises:
        UserError: a task cannot be opened, or the model; ``cloze`` without text.
    """
    folder = Path(path).parent if Path(path).is_file() else path
    tokenizer = load_tokenizer(str(folder), revision=revision)
    return score_model(open_for_measuring(path, revision), tokenizer, choice, windows=windows, device=device)


def score_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    choice: TaskChoice,
    *,
    windows: "Windows | None" = None,
    device: str | None = None,
) -> dict[str, TaskScore]:
    """``score_tasks`` for a model in memory, with fp32 weights."""
    own = LanguageModel(model, tokenizer, device=device or best_device(), batch=choice.batch)
    dials = {"limit": choice.limit, "seed": choice.seed}
    found: dict[str, TaskScore] = {}
    if cloze.NAME in choice.tasks:
        if windows is None:
            raise UserError("task cloze needs held-out text; give some (--text), or leave the task out")
        found[cloze.NAME] = cloze.score_cloze(own, windows, **dials)
    for file in choice.files:
        score = answers.score_answers(own, file, shots=choice.shots, **dials)
        found[score.task] = score
    if choice.of_harness:
        found |= harness.score_harness(own, harness.open_tasks(choice.of_harness), shots=choice.shots, **dials)
    return found


def unknown_tasks(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """(tasks that nothing knows, all names that are known); ([], []) when every task is known.

    Raises:
        UserError: lm-eval is needed and not installed.
    """
    asked = TaskChoice(tasks=tuple(tasks)).of_harness
    if not asked:
        return [], []
    known = harness.known_tasks(asked)
    unknown = [task for task in asked if not task.endswith(harness.SUFFIXES) and task not in known]
    return unknown, [cloze.NAME, *known] if unknown else []
