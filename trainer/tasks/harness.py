"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness), an optional package: its tasks, prompts and metrics, our model.

Tasks are names that it knows, or local YAML files of tasks. The model answers through ``LanguageModel``, so that quantized folders and
exports are scored as they are measured elsewhere. The package is imported when a task needs it, and never before.
"""

import importlib.util
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...models.common.errors import UserError
from ...models.common.files import sha256_file
from .language_model import LanguageModel
from .score import TaskScore

SUFFIXES = (".yaml", ".yml")
INSTALL = "pip install 'decoct[tasks]'"
_MOST_TOKENS = 256


@dataclass(frozen=True)
class Harness:
    """Opened tasks of lm-eval."""

    tasks: dict[str, Any]
    """Objects of lm-eval by name, those of groups too."""
    groups: dict[str, Any]
    sources: dict[str, str]
    """What defines each task."""

    @property
    def names(self) -> list[str]:
        """Names that have a score."""
        return [*self.groups, *self.tasks]


def installed() -> bool:
    """Whether lm-eval can be imported."""
    return importlib.util.find_spec("lm_eval") is not None


def known_tasks(tasks: Sequence[str]) -> list[str]:
    """Names that lm-eval has, for a message about one that it has not; [] where only files are asked for.

    Raises:
        UserError: lm-eval is not installed.
    """
    if not installed():
        raise UserError(
            f"task {', '.join(tasks)}: lm-eval is not installed, which has it; {INSTALL}. Without it there are 'cloze' and your own "
            "files of questions and answers (.jsonl)"
        )
    if all(task.endswith(SUFFIXES) for task in tasks):
        return []
    with _quiet():
        return list(_manager(tasks).all_tasks)


def open_tasks(tasks: Sequence[str]) -> Harness:
    """Open tasks by name or file, with their data: from the hub, if that is where a task has it.

    Raises:
        UserError: a file is no task, or data cannot be read; the message names the task.
    """
    opened: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    sources: dict[str, str] = {}
    with _quiet():
        manager = _manager(tasks)
        for task in tasks:
            if task.endswith(SUFFIXES) and not Path(task).is_file():
                raise UserError(f"task {task}: there is no such file; give a YAML file of a task of lm-eval")
            try:
                found = manager.load([task])
            except Exception as error:
                raise UserError(_unreadable(task, error)) from error
            opened |= found["tasks"]
            groups |= found.get("groups", {})
            told = f"{Path(task).name}, sha256 {sha256_file(Path(task))[:12]}" if task.endswith(SUFFIXES) else ""
            sources |= {name: _source(one, told) for name, one in found["tasks"].items()}
    return Harness(opened, groups, sources)


def _manager(tasks: Sequence[str]) -> Any:
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports] - optional

    # its own tasks are thousands of files to look through
    return TaskManager(include_defaults=not all(task.endswith(SUFFIXES) for task in tasks))


def _source(task: Any, told: str) -> str:
    from importlib.metadata import version

    return f"lm-eval {version('lm_eval')}, " + (told or f"version {getattr(task, 'VERSION', '?')}")


def _unreadable(task: str, error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    what = f"task {task}: lm-eval cannot open it ({type(error).__name__}: {first[:200]})"
    if task.endswith(SUFFIXES):
        return f"{what}; correct the file, or the data that it names"
    return (
        f"{what}; its data comes from the Hugging Face hub. Reach the hub once (its cache keeps the data), name a mirror in HF_ENDPOINT, "
        "or give a YAML file of a task on local data"
    )


def score_harness(
    model: LanguageModel, harness: Harness, *, shots: int | None = None, limit: int | None = None, seed: int = 0
) -> dict[str, TaskScore]:
    """Scores of all tasks and groups, by name.

    Args:
        model: The model.
        harness: The tasks.
        shots: Solved examples before each item; None = each task's own number.
        limit: Score at most the first ``limit`` items of each task; None = all.
        seed: Seed of the choice of examples.
    """
    from lm_eval import evaluator  # pyright: ignore[reportMissingImports] - optional

    from ..loop.rng import capture_generators, restore_generators

    # lm-eval seeds the global generators
    generators = capture_generators(torch.device("cpu"))
    try:
        with _quiet():
            found: Any = evaluator.simple_evaluate(
                model=_adapter(model), tasks=[*harness.groups.values(), *_alone(harness)], num_fewshot=shots, limit=limit,
                log_samples=False, bootstrap_iters=1000, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
                fewshot_random_seed=seed,
            )  # fmt: skip
    finally:
        restore_generators(generators, torch.device("cpu"))
    return {name: _score(name, found, harness, model, limit, seed) for name in harness.names if _numbers(found["results"].get(name, {}))}


def _alone(harness: Harness) -> list[Any]:
    """Tasks that belong to no group that is opened: a group brings its own."""
    inside = {task.task_name for group in harness.groups.values() for task in group.get_all_tasks()}
    return [task for name, task in harness.tasks.items() if name not in inside]


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    """Metrics by name ('acc', or 'exact_match (strict-match)'), in the task's order, without errors."""
    found = {}
    for key, value in result.items():
        name, comma, kind = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            found[name if kind == "none" else f"{name} ({kind})"] = float(value)
    return found


def _score(name: str, found: dict[str, Any], harness: Harness, model: LanguageModel, limit: int | None, seed: int) -> TaskScore:
    result = found["results"][name]
    metrics = _numbers(result)
    metric = next(iter(metrics))
    bare, _, kind = metric.partition(" (")
    error = result.get(f"{bare}_stderr,{kind.rstrip(')') or 'none'}")
    counts = found.get("n-samples", {}).get(name) or {}
    inside = [task.task_name for task in harness.groups[name].get_all_tasks()] if name in harness.groups else [name]
    items = counts.get("effective") or sum(found["n-samples"][task]["effective"] for task in inside)
    return TaskScore(
        task=name,
        metric=metric,
        score=metrics[metric],
        stderr=float(error) if isinstance(error, int | float) else None,
        items=int(items),
        shots=int(found.get("n-shot", {}).get(inside[0]) or 0),
        limit=limit,
        batch=model.batch,
        seed=seed,
        source=harness.sources[inside[0]],
        higher_is_better=bool(found.get("higher_is_better", {}).get(name, {}).get(bare, True)),
        metrics=metrics if len(metrics) > 1 else None,
    )


def _adapter(model: LanguageModel) -> Any:
    """The model as lm-eval's ``LM``: each request has its arguments as a tuple."""
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports] - optional

    class Adapter(LM):
        """Hands every request on."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            contexts, continuations = zip(*(request.args for request in requests))
            return [(each.logprob, each.greedy) for each in model.loglikelihood(contexts, continuations)]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return model.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return _generated(model, [request.args for request in requests])

    return Adapter()


def _generated(model: LanguageModel, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Text for each request; those with the same stop strings and length go together."""
    kinds: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for index, (_, how) in enumerate(requests):
        if how.get("do_sample") and how.get("temperature", 1.0) > 0:
            raise UserError(
                "the task samples its answers (do_sample: true), and decoct scores greedy text; set do_sample: false in its YAML"
            )
        stops = how.get("until") or ()
        length = int(how.get("max_gen_toks") or how.get("max_new_tokens") or how.get("max_tokens") or _MOST_TOKENS)
        kinds.setdefault(((stops,) if isinstance(stops, str) else tuple(stops), length), []).append(index)
    found = [""] * len(requests)
    for (stops, length), indices in kinds.items():
        texts = model.generate_until([requests[index][0] for index in indices], stops, length)
        for index, text in zip(indices, texts):
            found[index] = text
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps progress bars and advice of lm-eval off the console."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
