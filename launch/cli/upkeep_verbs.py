"""The verbs of an owner between runs: look, clear, upload; and completion for shells. Nothing heavy is imported here."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command(epilog="Example: decoct runs    or: decoct runs /scratch/runs --json")
def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of run folders, or one run folder.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List run folders: recipe, running, finished or failed, stage and step, last figures, age."""
    from .runs_verb import run_runs

    run_runs(folder, as_json)


@app.command(epilog="Example: decoct clean runs/quickstart --dry-run")
def clean(
    run: Annotated[list[Path] | None, typer.Argument(metavar="RUN", help="Run folders.")] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Also the shared cache (DECOCT_CACHE): tokenized text, scratch teachers, teachers' predictions.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed; remove nothing.")] = False,
) -> None:
    """Remove checkpoints of finished stages and superseded stages; never a model of the report, an export, or a way to resume."""
    from .clean_verb import run_clean

    run_clean(run or (), cache=cache, yes=yes, dry_run=dry_run)


@app.command(epilog="Example: decoct push runs/quickstart/06-export/compressed-tensors me/my-student-int4")
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Model folder or export.")],
    hub_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hugging Face hub; made if it is new.")],
    public: Annotated[bool, typer.Option("--public", help="A new repository is public.", show_default="private")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Upload without asking.")] = False,
    message: Annotated[str, typer.Option("--message", help="Commit message.")] = "Upload with decoct",
) -> None:
    """Upload a finished model folder or export to the Hugging Face hub, in one commit, after every byte was checked."""
    from .push_verb import run_push

    run_push(folder, hub_id, public=public, yes=yes, message=message)


@app.command(epilog="Example: decoct completion bash > ~/.local/share/bash-completion/completions/decoct")
def completion(shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]) -> None:
    """Print the script with which a shell completes verbs and options (--install-completion puts it in place)."""
    from typer.completion import get_completion_script  # pyright: ignore[reportPrivateImportUsage] - typer makes scripts nowhere else

    from ...models.common.errors import UserError

    if shell not in ("bash", "zsh", "fish"):
        raise UserError(f"{shell!r} is not one of bash, zsh, fish")
    typer.echo(get_completion_script(prog_name="decoct", complete_var="_DECOCT_COMPLETE", shell=shell))
