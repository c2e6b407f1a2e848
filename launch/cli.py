"""The command line: `decoct VERB ...`.

A user's mistake ends with one readable message and exit code 2, a non-finite loss with 1, a failed quality gate with 3.
`--debug` shows the traceback. Nothing heavy is imported here: help and usage errors come at once.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ..models.errors import DecoctError, GateFailed
from . import export_verbs, model_verbs, recipe_verbs
from .command_group import Verbs

app = typer.Typer(
    name="decoct",
    cls=Verbs,
    help="Boil a large language model down to one that can be served: distil, prune, train quantized, export, verify, report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verbs in (recipe_verbs, model_verbs, export_verbs):
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
    """Options of every verb; ``main`` reads them before typer does, so that they may stand anywhere."""


def _split_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    return [a for a in arguments if a != "--debug"], "--debug" in arguments


def _tell(message: str) -> None:
    """One message on rank 0's stderr; the other ranks stay silent."""
    if os.environ.get("RANK", "0") == "0":
        print(f"decoct: {message}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: runs the verb and ends the process with its exit code."""
    from .run.workers import FINAL_CODES, leave, remember_outcome, remembered_outcome

    given, debug = _split_debug(sys.argv[1:] if arguments is None else arguments)
    decided = remembered_outcome()
    if decided is not None:
        sys.exit(decided)
    try:
        app(args=given, prog_name="decoct")
    except DecoctError as error:
        remember_outcome(error.exit_code)
        if debug:
            raise
        _tell(f"error: {error}")
        if isinstance(error, GateFailed):
            leave(error.exit_code)  # the run itself is finished
        sys.exit(error.exit_code)
    except OSError as error:
        # a path of the user's that nothing more can be said of: too long, a loop of links, a file system that is not one
        if debug or error.filename is None:
            raise
        remember_outcome(2)
        _tell(f"error: {error.filename}: {error.strerror}; give another path (--debug shows where it was used)")
        sys.exit(2)
    except KeyboardInterrupt:
        remember_outcome(130)
        _tell("interrupted; run the same command again to go on from the last checkpoint")
        sys.exit(130)
    except SystemExit as ended:
        if ended.code in FINAL_CODES:
            remember_outcome(int(ended.code))
        if not ended.code:
            leave(0)
        raise


if __name__ == "__main__":
    main()
