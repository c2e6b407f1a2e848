"""The verbs that run or inspect a recipe. Nothing heavy is imported here, so that help and usage errors appear at once."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Out, Overrides, Recipe

app = typer.Typer()
shipped_app = typer.Typer(help="The recipes that come with decoct.", no_args_is_help=True)


@app.command(epilog="Example: decoct run configs/quickstart.yaml trainer.devices=2")
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
) -> None:
    """Run a recipe: every stage in order, skipping finished stages and resuming interrupted ones; then write the report."""
    from ...configs.loader import load_recipe
    from ..run.start import start
    from ..terminal.imported_code import tell_imported

    start(load_recipe(recipe, overrides or (), tell=tell_imported), out)


@app.command(epilog="Example: decoct cache recipe.yaml teacher.cache.mode=top_k")
def cache(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
) -> None:
    """Run the teacher over the text of a recipe once and keep its predictions on disk (teacher.cache), without training."""
    from ...configs.loader import load_recipe
    from ...models.common.errors import UserError
    from ..run.start import start
    from ..terminal.imported_code import tell_imported

    loaded = load_recipe(recipe, overrides or (), tell=tell_imported)
    if loaded.teacher is None or loaded.teacher.cache is None:
        raise UserError("the recipe keeps no cache of its teacher; add one: teacher.cache.mode=hybrid (or top_k, sampled, hidden)")
    start(loaded, out, only_caches=True)


@app.command(epilog="Example: decoct launch qwen3-8b-4b-int4 --gpus 8 --nodes 2 --target slurm --print")
def launch(
    recipe: Recipe,
    overrides: Overrides = None,
    target: Annotated[str, typer.Option("--target", help="Where to run: local, torchrun, slurm or kubernetes.")] = "local",
    show: Annotated[bool, typer.Option("--print", help="Print the command or file; start nothing.")] = False,
    gpus: Annotated[int | None, typer.Option("--gpus", help="Processes per node.", show_default="the recipe's")] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="Number of machines.")] = 1,
    max_restarts: Annotated[int, typer.Option("--max-restarts", help="Restarts after a crash; each resumes from the last checkpoint.")] = 3,
    out: Out = None,
    job_id: Annotated[str | None, typer.Option("--job-id", help="Rendezvous id, the same on all nodes.", show_default=False)] = None,
    rdzv_endpoint: Annotated[str | None, typer.Option("--rdzv-endpoint", help="torchrun: HOST:PORT of the first node.")] = None,
    node_rank: Annotated[int | None, typer.Option("--node-rank", help="torchrun: rank of this node, from 0.")] = None,
    grace: Annotated[int, typer.Option("--grace", help="Seconds that a stopped job gets to save a checkpoint.")] = 120,
    partition: Annotated[str | None, typer.Option("--partition", help="slurm: partition.")] = None,
    account: Annotated[str | None, typer.Option("--account", help="slurm: account.")] = None,
    time: Annotated[str | None, typer.Option("--time", help="slurm: time limit, such as 24:00:00.")] = None,
    image: Annotated[str | None, typer.Option("--image", help="kubernetes: container image.")] = None,
    namespace: Annotated[str, typer.Option("--namespace", help="kubernetes: namespace.")] = "default",
    volume_claim: Annotated[
        str | None, typer.Option("--volume-claim", help="kubernetes: persistent volume claim for runs and cache.")
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option("--secret", help="kubernetes: environment variable from a secret, as VARIABLE=SECRET/KEY; repeatable."),
    ] = None,
    kind: Annotated[str, typer.Option("--kind", help="kubernetes: kind of the manifest, trainjob or jobset.")] = "trainjob",
) -> None:
    """Run a recipe on this machine's GPUs, on several nodes, or through a scheduler, with restarts, resuming and one log file per rank."""
    from ..jobs.job import Slurm
    from .launch_verb import Choices, run_launch

    choices = Choices(
        target=target, show=show, gpus=gpus, nodes=nodes, restarts=max_restarts, out=out, job_id=job_id, endpoint=rdzv_endpoint,
        node_rank=node_rank, grace=grace, slurm=Slurm(partition=partition, account=account, time=time), image=image,
        namespace=namespace, volume_claim=volume_claim, secrets=secret or (), kind=kind,
    )  # fmt: skip
    run_launch(recipe, overrides or (), choices)


@app.command(epilog="Example: decoct footprint 70B --context 32768 --batch 8")
def footprint(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hub id, stored architecture, or a size such as 70B.")],
    context: Annotated[
        str | None,
        typer.Option("--context", help="Tokens in the KV cache, such as 32k.", show_default="the model's, at most 8,192"),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", help="Sequences in the KV cache.")] = "1",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how many bytes a model takes at each precision: parameters alone, stored weights with scales, and the KV cache."""
    from ..plan.ladder import run_footprint

    run_footprint(model, context, batch, as_json)


@app.command(epilog="Example: decoct plan qwen3-8b-4b-int4 --gpus 8 --gpu H100 --price 2.5")
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option("--gpus", help="GPUs per node.", show_default="the recipe's, or those found here")] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="Number of machines.")] = 1,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", help="Memory of one GPU, such as 80GB.", show_default="as found here")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", help="GPUs that will serve one copy of the export.")] = 1,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Kind of GPU, such as H100: its speed and memory.", show_default="as found here")
    ] = None,
    efficiency: Annotated[
        float | None,
        typer.Option("--efficiency", help="Share of the GPU's peak that training reaches, an assumption.", show_default="0.4"),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option("--link", help="What a GPU sends to others in a second, such as 50GB.", show_default="the GPU's, in one machine"),
    ] = None,
    tokens_per_second: Annotated[
        str | None,
        typer.Option(
            "--tokens-per-second",
            help="Measured speed of the first training stage, over all GPUs; other stages follow by their operations.",
            show_default="as this run has logged",
        ),
    ] = None,
    price: Annotated[float | None, typer.Option("--price", help="Price of one GPU for an hour.", show_default=False)] = None,
    out: Out = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what each stage of a recipe needs and produces: sizes, tokens, disk, memory, time, serving stacks. No weights are downloaded."""
    from .plan_verb import Asked, run_plan

    asked = Asked(
        gpus=gpus, nodes=nodes, gpu_memory=gpu_memory, tensor_parallel=tensor_parallel, gpu=gpu, efficiency=efficiency, link=link,
        tokens_per_second=tokens_per_second, price=price, out=out,
    )  # fmt: skip
    run_plan(recipe, overrides or (), asked, as_json)


@shipped_app.command("list", epilog="Example: decoct recipes list")
def recipes_list() -> None:
    """List the shipped recipes, one line each."""
    from ...configs.shipped import list_recipes

    for name, _, about in list_recipes():
        typer.echo(f"{name:<30} {about}")


@shipped_app.command("show", epilog="Example: decoct recipes show quickstart")
def recipes_show(name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")]) -> None:
    """Print a shipped recipe."""
    from ...configs.shipped import shipped_text

    typer.echo(shipped_text(name), nl=False)


@shipped_app.command("copy", epilog="Example: decoct recipes copy quickstart my-recipe.yaml")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    target: Annotated[Path | None, typer.Argument(help="File to write.", show_default="NAME.yaml")] = None,
) -> None:
    """Copy a shipped recipe to a file of your own, with the schema for your editor; an existing recipe is never overwritten."""
    from .recipe_files import SCHEMA_NAME, copy_recipe, write_schema

    copied = copy_recipe(name, target or Path(f"{name}.yaml"))
    typer.echo(f"wrote {copied}")
    schema = copied.with_name(SCHEMA_NAME)
    typer.echo(f"wrote {write_schema(schema)}: editors complete and check the keys of {copied.name} with it")


@shipped_app.command("schema", epilog="Example: decoct recipes schema --out recipe.schema.json")
def recipes_schema(
    out: Annotated[Path | None, typer.Option("--out", help="File to write.", show_default="print it")] = None,
) -> None:
    """Print the JSON Schema of recipes. Name it in the first line of a recipe: # yaml-language-server: $schema=recipe.schema.json."""
    from ...configs.shipped import SCHEMA_FILE
    from .recipe_files import write_schema

    if out is None:
        typer.echo(SCHEMA_FILE.read_text(encoding="utf-8"), nl=False)
    else:
        typer.echo(f"wrote {write_schema(out)}")
