"""The command line: `decoct VERB ...`.

A user's mistake ends with one message and exit code 2, a failure while running (a loss that is not finite, memory, a broken disk) with 1,
and a failed quality gate with 3; ``boundary`` decides which. `--debug` shows the traceback. Nothing heavy is imported here, so that help
and usage errors appear at once.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from typing import Annotated, NoReturn

import typer

from ...models.common.errors import DecoctError, GateFailed, MemoryFullError, UserError
from ..cli import answer_verbs, export_verbs, model_verbs, recipe_verbs, upkeep_verbs
from .command_group import Verbs

_INTERRUPTED = "interrupted; run the same command again to resume from the last checkpoint"
_KEEPS_NOTHING = ("generate", "chat", "compare", "push", "clean", "runs")
"""Verbs without checkpoints."""

app = typer.Typer(
    name="decoct",
    cls=Verbs,
    help="Boil a large language model down to one that can be served: distil, prune, train quantized, export, verify, report.",
    no_args_is_help=True,
    # rich tracebacks show local variables, and with them whatever key or text is in them
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verbs in (recipe_verbs, model_verbs, export_verbs, answer_verbs, upkeep_verbs):
    app.add_typer(verbs.app)
app.add_typer(recipe_verbs.shipped_app, name="recipes")


def _tell_version(asked: bool) -> None:
    if asked:
        from decoct import __version__

        typer.echo(f"decoct {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Show the version and end.")] = False,
) -> None:
    """Options of every verb; ``main`` reads them before typer does, so that they may be anywhere on the command line."""


def _split_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    return [a for a in arguments if a != "--debug"], "--debug" in arguments


def _tell(message: str) -> None:
    """Print a message on stderr, with unsafe characters escaped; a stream that cannot be written is not a second error."""
    from ...models.common.terminal_text import printable

    with suppress(OSError, ValueError):
        print(f"decoct: {printable(message)}", file=sys.stderr, flush=True)


def _tell_interrupted(arguments: Sequence[str]) -> None:
    """Print what Ctrl-C leaves behind, on rank 0 only, since all ranks have the same message."""
    if os.environ.get("RANK", "0") == "0":
        _tell("interrupted" if arguments and arguments[0] in _KEEPS_NOTHING else _INTERRUPTED)


def _end(error: BaseException) -> NoReturn:
    """End the process with the error's message and exit code, or with a traceback and how to report it."""
    from ..run.processes import FINAL_CODES, leave, remember_outcome, told_by_another
    from ..terminal.boundary import bug_report, ending_of

    ending = ending_of(error)
    rank = os.environ.get("RANK", "0")
    if ending is None:
        # every rank tells its own: a bug may be in one rank alone
        _tell_bug(bug_report(error))
        sys.exit(1)
    if rank == "0":
        _tell(f"error: {ending.message}")
    # all ranks meet most faults together; one message is enough, unless only this rank can know of it
    elif ending.by_all or isinstance(error, MemoryFullError) or not told_by_another():
        _tell(f"rank {rank}: error: {ending.message}")
    if isinstance(error, DecoctError) or ending.code in FINAL_CODES:
        remember_outcome(ending.code)  # another start would end the same way
    if isinstance(error, GateFailed):
        leave(ending.code)  # the run itself is finished
    sys.exit(ending.code)


def _tell_bug(text: str) -> None:
    from ...models.common.terminal_text import printable

    with suppress(OSError, ValueError):
        print(printable(text), file=sys.stderr, flush=True)


def _check_arguments(arguments: Sequence[str]) -> None:
    """Raise UserError for arguments that are not UTF-8: writing such a name would fail later, during a run."""
    for text in (*arguments, os.environ.get("DECOCT_CACHE", "")):
        # Python reads bytes that it cannot decode as lone surrogates (PEP 383)
        if any("\udc80" <= letter <= "\udcff" for letter in text):
            try:
                os.fsencode(text).decode()
            except UnicodeDecodeError:
                raise UserError(f"{text} is not UTF-8, which every name in a run folder must be; rename the file or folder") from None
            # the bytes are UTF-8 after all: the locale could not read them
            raise UserError(
                f"the locale's encoding ({sys.getfilesystemencoding()}) lacks characters of {text}; set PYTHONUTF8=1 or LC_ALL=C.UTF-8"
            )


def _soften_streams() -> None:
    """Write characters that the terminal's encoding lacks as escapes instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the verb and end the process with its exit code."""
    from ..run.processes import FINAL_CODES, leave, remember_outcome, remembered_outcome

    # before typer, so that an error of typer itself can be debugged too
    given, debug = _split_debug(sys.argv[1:] if arguments is None else arguments)
    # before the first message
    _soften_streams()
    # torchrun restarts a worker whatever its exit code was; the restarted one leaves at once with the code of the first
    decided = remembered_outcome()
    if decided is not None:
        sys.exit(decided)
    try:
        _check_arguments(given)
        app(args=given, prog_name="decoct")
    except KeyboardInterrupt:
        _tell_interrupted(given)
        remember_outcome(130)
        sys.exit(130)
    except SystemExit as ended:
        if ended.code == 130:  # what typer makes of Ctrl-C
            _tell_interrupted(given)
        # decided: a worker that is started again leaves with it at once
        if ended.code in FINAL_CODES:
            remember_outcome(int(ended.code))
        # typer ends a verb that worked with SystemExit(0)
        if not ended.code:
            leave(0)
        raise
    except BaseException as error:
        if debug:
            if isinstance(error, DecoctError):
                remember_outcome(error.exit_code)
            raise
        _end(error)


if __name__ == "__main__":
    main()
