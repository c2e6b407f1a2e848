"""The command line: `decoct VERB ...`.

A user's mistake ends with one readable message and exit code 2, a non-finite loss with 1, a failed quality gate with 3.
`--debug` shows the traceback. Nothing heavy is imported here: help and usage errors come at once.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..models.errors import DecoctError, GateFailed

app = typer.Typer(
    name="decoct",
    help="Boil a large language model down to one that can be served: distil, prune, train quantized, export, verify, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="The recipes that come with decoct.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or hub id.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as stages.0.learning_rate=1e-4.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder.", show_default="runs/NAME")]
Teacher = Annotated[str | None, typer.Option("--teacher", help="Teacher: model folder or hub id.")]
Text = Annotated[
    list[str] | None,
    typer.Option("--text", help="Text files (txt, jsonl, parquet, globs); repeatable.", show_default="the Python standard library"),
]
Hub = Annotated[str | None, typer.Option("--hub", help="Hugging Face dataset id, instead of --text.")]
Tokens = Annotated[str | None, typer.Option("--tokens", help="Training tokens, such as 500k or 2M.")]
SeqLength = Annotated[int, typer.Option("--seq-length", help="Tokens a window.")]
Bits = Annotated[int, typer.Option("--bits", help="Bits of a weight.")]
GroupSize = Annotated[str, typer.Option("--group-size", help="Inputs that share a scale, or 'channel'.")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Options of every verb; ``main`` reads them before typer does, so that they may stand anywhere."""


@app.command(epilog="Example: decoct run configs/quickstart.yaml trainer.devices=2")
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    out: Out = None,
) -> None:
    """Run a recipe: every stage in order, skipping what is done, resuming what was broken off; ends with the report."""
    from ..configs.loader import load_recipe
    from .run.start import start

    start(load_recipe(recipe, overrides or ()), out)


@app.command(epilog="Example: decoct cache recipe.yaml teacher.cache.mode=top_k")
def cache(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    out: Out = None,
) -> None:
    """Let the teacher predict the text of a recipe once and keep it on disk (teacher.cache); nothing is trained."""
    from ..configs.loader import load_recipe
    from ..models.errors import UserError
    from .run.start import start

    loaded = load_recipe(recipe, overrides or ())
    if loaded.teacher is None or loaded.teacher.cache is None:
        raise UserError("the recipe keeps no cache of its teacher; add one: teacher.cache.mode=hybrid (or top_k, sampled)")
    start(loaded, out, only_caches=True)


@app.command(epilog="Example: decoct launch qwen3-8b-4b-int4 --gpus 8 --nodes 2 --target slurm --print")
def launch(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    target: Annotated[str, typer.Option("--target", help="local, torchrun, slurm or kubernetes.")] = "local",
    show: Annotated[bool, typer.Option("--print", help="Print the command or file, and start nothing.")] = False,
    gpus: Annotated[int | None, typer.Option("--gpus", help="Processes on each node.", show_default="the recipe's")] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="Machines.")] = 1,
    max_restarts: Annotated[int, typer.Option("--max-restarts", help="Starts after a crash; each resumes by itself.")] = 3,
    out: Out = None,
    job_id: Annotated[str | None, typer.Option("--job-id", help="Rendezvous id, the same on all nodes.", show_default=False)] = None,
    rdzv_endpoint: Annotated[str | None, typer.Option("--rdzv-endpoint", help="torchrun: HOST:PORT of the first node.")] = None,
    node_rank: Annotated[int | None, typer.Option("--node-rank", help="torchrun: number of this node.")] = None,
    grace: Annotated[int, typer.Option("--grace", help="Seconds to save in when the job is stopped.")] = 120,
    partition: Annotated[str | None, typer.Option("--partition", help="slurm: partition.")] = None,
    account: Annotated[str | None, typer.Option("--account", help="slurm: account.")] = None,
    time: Annotated[str | None, typer.Option("--time", help="slurm: time limit, such as 24:00:00.")] = None,
    image: Annotated[str | None, typer.Option("--image", help="kubernetes: container image.")] = None,
    namespace: Annotated[str, typer.Option("--namespace", help="kubernetes: namespace.")] = "default",
    volume_claim: Annotated[str | None, typer.Option("--volume-claim", help="kubernetes: claim for runs and cache.")] = None,
    secret: Annotated[list[str] | None, typer.Option("--secret", help="kubernetes: VARIABLE=SECRET/KEY; repeatable.")] = None,
    kind: Annotated[str, typer.Option("--kind", help="kubernetes: trainjob or jobset.")] = "trainjob",
) -> None:
    """Run a recipe on this machine's GPUs, on many nodes, or through a scheduler, with restarts, resuming and a log file for each rank."""
    from .jobs.job import Slurm
    from .jobs.verb import Choices, run_launch

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
    """Say what a model takes at each precision: bare parameters beside the stored weights with scales and embeddings, and the KV cache."""
    from .plan.ladder import run_footprint

    run_footprint(model, context, batch, as_json)


@app.command(epilog="Example: decoct plan qwen3-8b-4b-int4 --gpus 8 --gpu-memory 80GB")
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option("--gpus", help="GPUs on each node.", show_default="those found here")] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="Machines.")] = 1,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", help="Memory of one GPU, such as 80GB.", show_default="as found here")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", help="GPUs that will serve one copy of the export.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a recipe will need and yield, stage by stage: sizes, tokens, disk, memory by role, who serves it. Downloads no weights."""
    from .plan.verb import run_plan

    run_plan(recipe, overrides or (), gpus, nodes, gpu_memory, tensor_parallel, as_json)


@app.command(epilog="Example: decoct distill student/ --teacher HuggingFaceTB/SmolLM2-1.7B --text 'corpus/*.jsonl' --tokens 10M")
def distill(
    model: Model,
    overrides: Overrides = None,
    teacher: Teacher = None,
    text: Text = None,
    hub: Hub = None,
    tokens: Tokens = "1M",
    seq_length: SeqLength = 512,
    out: Out = None,
) -> None:
    """Train MODEL to predict what a teacher predicts."""
    from .verbs import TextChoice, run_verb

    run_verb("distill", model, {"tokens": tokens}, TextChoice(text, hub, seq_length), teacher, overrides, out)


@app.command(epilog="Example: decoct prune student/ --ffn 384    or: decoct prune student/ --keep 0.7 --teacher big/ --tokens 2M")
def prune(
    model: Model,
    overrides: Overrides = None,
    ffn: Annotated[int | None, typer.Option("--ffn", help="FFN channels kept in every layer (the model gets smaller).")] = None,
    keep: Annotated[float | None, typer.Option("--keep", help="Share of the linear weights that stays (the others become zero).")] = None,
    teacher: Teacher = None,
    text: Text = None,
    hub: Hub = None,
    tokens: Tokens = None,
    seq_length: SeqLength = 512,
    out: Out = None,
) -> None:
    """Remove FFN channels of MODEL (--ffn), or set its smallest weights to zero (--keep; along a schedule with --tokens)."""
    from .verbs import TextChoice, prune_settings, run_verb

    run_verb("prune", model, prune_settings(ffn, keep, tokens), TextChoice(text, hub, seq_length), teacher, overrides, out)


@app.command(epilog="Example: decoct qat student/ --teacher big/ --bits 4 --group-size 64 --tokens 5M")
def qat(
    model: Model,
    overrides: Overrides = None,
    bits: Bits = 4,
    group_size: GroupSize = "128",
    teacher: Teacher = None,
    text: Text = None,
    hub: Hub = None,
    tokens: Tokens = "1M",
    train: Annotated[str, typer.Option("--train", help="all, or scales: these alone, over fixed codes of a byte a weight.")] = "all",
    start: Annotated[
        str | None,
        typer.Option("--start", help="First scales: rtn, mse (searched) or gptq.", show_default="gptq; mse with --lora"),
    ] = None,
    lora: Annotated[int | None, typer.Option("--lora", help="Rank of an adapter that trains instead of the weights.")] = None,
    seq_length: SeqLength = 512,
    out: Out = None,
) -> None:
    """Train MODEL with rounded weights; without --teacher it learns from its own unrounded self."""
    from .verbs import TextChoice, run_verb

    settings = {"tokens": tokens, "weights": {"bits": bits, "group_size": group_size}, "train": train, "start": start, "lora": lora}
    run_verb("qat", model, settings, TextChoice(text, hub, seq_length), teacher, overrides, out)


@app.command(epilog="Example: decoct quantize student/ --method gptq --bits 4 --group-size 64 --text 'corpus/*.txt'")
def quantize(
    model: Model,
    overrides: Overrides = None,
    method: Annotated[str, typer.Option("--method", help="rtn (to nearest), mse (searched scales) or gptq (calibrated on text).")] = "rtn",
    bits: Bits = 4,
    group_size: GroupSize = "128",
    calibration_tokens: Annotated[
        str | None,
        typer.Option("--calibration-tokens", help="Tokens of the text to calibrate on.", show_default="262,144"),
    ] = None,
    teacher: Teacher = None,
    text: Text = None,
    hub: Hub = None,
    seq_length: SeqLength = 512,
    out: Out = None,
) -> None:
    """Round the weights of MODEL without training; with --method gptq on text, a layer at a time."""
    from .verbs import TextChoice, run_verb

    settings = {"method": method, "weights": {"bits": bits, "group_size": group_size}, "calibration_tokens": calibration_tokens}
    run_verb("quantize", model, settings, TextChoice(text, hub, seq_length), teacher, overrides, out)


_FORMATS = (
    "compressed-tensors (vLLM, SGLang, transformers), gguf (llama.cpp), gptq, gptq_v2 (asymmetric), awq (4 bits), safetensors (plain "
    "16-bit floats); of plain weights also gguf-bf16, gguf-f16 or gguf-f32."
)


@app.command(epilog="Example: decoct export runs/quickstart/05-qat/model --out served/")
def export(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Quantized model folder (made by qat or quantize); a plain one for gguf-f16 and the like."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")],
    form: Annotated[str, typer.Option("--format", help=_FORMATS)] = "compressed-tensors",
    allow_inexact: Annotated[bool, typer.Option("--allow-inexact", help="Round plain weights that the format does not hold.")] = False,
    reader_version: Annotated[
        str | None,
        typer.Option("--reader-version", help="Of compressed-tensors, for 3, 5, 6 or 7 bits: 0.18.0 or later.", show_default=False),
    ] = None,
) -> None:
    """Pack a quantized folder for serving stacks, and check the result with a reader that did not write it."""
    from .verbs import run_export

    run_export(model, out, form, allow_inexact, reader_version)


@app.command(epilog="Example: decoct verify runs/quickstart/06-export/compressed-tensors")
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Export folder, or a .gguf file.")],
    source: Annotated[Path | None, typer.Option("--source", help="Quantized folder it was made from; compared element by element.")] = None,
    runtimes: Annotated[bool, typer.Option("--runtimes/--no-runtimes", help="Also load it in the runtimes that are installed.")] = True,
) -> None:
    """Check an export: hashes, structure, scales, every weight, and what installed runtimes make of it."""
    from .verbs import run_verify

    run_verify(folder, source, runtimes)


@app.command(epilog="Example: decoct evaluate served/ --teacher big/ --text 'held-out/*.txt'")
def evaluate(
    model: Model,
    teacher: Teacher = None,
    text: Text = None,
    hub: Hub = None,
    seq_length: SeqLength = 512,
    tokens: Annotated[str, typer.Option("--tokens", help="Tokens to measure on.")] = "32k",
    max_perplexity_increase: Annotated[str | None, typer.Option(help="Gate: exit code 3 above this, such as 5%.")] = None,
    out: Out = None,
) -> None:
    """Measure a model folder or export: perplexity, KL and top-1 agreement with a teacher, calibration, size."""
    from .verbs import TextChoice, run_evaluate

    run_evaluate(model, TextChoice(text, hub, seq_length, tokens), teacher, max_perplexity_increase, out)


@app.command(epilog="Example: decoct doctor")
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions and devices, combinations known to be bad, and what is missing for each verb."""
    from .doctor import run_doctor

    run_doctor(as_json)


@recipes_app.command("list", epilog="Example: decoct recipes list")
def recipes_list() -> None:
    """The shipped recipes, one line each."""
    from ..configs.shipped import list_recipes

    for name, _, about in list_recipes():
        typer.echo(f"{name:<30} {about}")


@recipes_app.command("show", epilog="Example: decoct recipes show quickstart")
def recipes_show(name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")]) -> None:
    """Print a shipped recipe."""
    from ..configs.shipped import shipped_text

    typer.echo(shipped_text(name), nl=False)


@recipes_app.command("copy", epilog="Example: decoct recipes copy quickstart my-recipe.yaml")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    target: Annotated[Path | None, typer.Argument(help="File to write.", show_default="NAME.yaml")] = None,
) -> None:
    """Write a shipped recipe to a file of your own; an existing file is never overwritten."""
    from .verbs import copy_recipe

    typer.echo(f"wrote {copy_recipe(name, target or Path(f'{name}.yaml'))}")


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
