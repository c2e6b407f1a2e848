"""Runs a recipe in this process, or under torchrun if it needs more than one device."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..terminal.imported_code import PLANNED
from .counts import check_processes, check_workers
from .processes import Agent, die_with_agent, run_under_torchrun, wanted_processes

if TYPE_CHECKING:
    from ...configs.recipe import Recipe
    from ...trainer.processes.world import World


def start(
    recipe: "Recipe", out: Path | None, *, only_caches: bool = False, arguments: Sequence[str] | None = None, quiet: bool = False
) -> None:
    """Run ``recipe`` in ``out`` (default ``runs/<name>``); raises SystemExit with the workers' exit code if they fail.

    Args:
        recipe: The recipe.
        out: The run folder.
        only_caches: Fill the teacher's caches and train nothing.
        arguments: What further processes are started with, as arguments of `decoct`; None = those of this process.
        quiet: Print nothing but errors, if the run needs no further process.
    """
    from ...trainer.processes.world import current_world
    from ...trainer.trackers.build import check_trackers

    # before anything that takes time: if the agent is killed meanwhile, this process must go too
    die_with_agent()
    world = current_world()
    where = out or Path("runs") / recipe.name
    check_trackers(recipe.logger)
    check_workers(recipe.trainer.num_workers)
    # a worker of torchrun with one process is not alone: its agent restarts it, and must not be doubled
    alone = world.size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
    if alone:
        check_processes(wanted_processes(recipe.trainer.devices))
    # before processes are started: a refusal of the plan should come once, and from a process without ranks
    _plan_first(recipe, where, world, quiet=quiet)
    if alone:
        processes = wanted_processes(recipe.trainer.devices)
        if processes > 1:
            from .run_folder import RunFolder

            folder = RunFolder(where)
            made = folder.highest_missing()
            os.environ[PLANNED] = "1"  # for the workers alone: the next run of this process is planned too
            try:
                code = run_under_torchrun(sys.argv[1:] if arguments is None else arguments, Agent(processes=processes))
            finally:
                del os.environ[PLANNED]
            # the workers have said what happened; only their code is passed on
            if code:
                # here and not in a worker, where the others still read status files in the folder
                if made is not None and not folder.has_begun():
                    folder.discard(made)
                raise SystemExit(code)
            return
    quiet_libraries()
    from .runner import Runner

    runner = Runner(recipe, where, world, quiet=quiet)
    if only_caches:
        runner.fill_caches()
    else:
        runner.run()


def _plan_first(recipe: "Recipe", out: Path, world: "World", *, quiet: bool) -> None:
    """Show the plan once for all processes, and stop if something cannot work."""
    if not world.is_first or os.environ.get(PLANNED):
        return
    quiet_libraries()
    from ..plan.before_run import check_before_run
    from ..terminal.console import CleanConsole

    check_before_run(recipe, out, CleanConsole(quiet=quiet), nodes=world.nodes)
    if any(getattr(entry.settings, "tasks", ()) for entry in recipe.stages):
        from .task_checks import check_tasks

        for entry in recipe.stages:
            if entry.kind == "evaluate":
                check_tasks(entry.settings)


def quiet_libraries() -> None:
    """Keep third parties' progress bars and advice off the console; warnings that concern numbers stay."""
    import logging
    import warnings

    # under torchrun the threads are on while text is encoded, and off afterwards (``trainer/data/tokens.py``)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
