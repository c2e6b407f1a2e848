"""The verbs that ask a model something, or set models side by side. Nothing heavy is imported here."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Hub, MeasuredTokens, Model, SeqLength, Tasks, Text

app = typer.Typer()
Revision = Annotated[str | None, typer.Option("--revision", help="Hub revision of MODEL.")]
System = Annotated[str | None, typer.Option("--system", help="System prompt of the conversation.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token; higher values sample more freely.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample among the likeliest tokens that have this probability together.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of sampling: the same seed gives the same answer.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Numbers to compute in: fp32 (as everything is measured) or bf16 (half the memory).")]


@app.command(epilog="Example: decoct generate served/ --prompt 'Once upon a time' --compare TEACHER")
def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Text to go on from; repeatable; - is stdin.")] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompts", help='File with a prompt in each line, or jsonl with rows {"prompt": ...}; repeatable; - is stdin.'),
    ] = None,
    compare: Annotated[str | None, typer.Option("--compare", help="Another model, whose answers are shown beside.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Each prompt is a message: use the model's chat template.")] = False,
    system: System = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest answer.")] = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "fp32",
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Let a model folder, quantized folder or export go on from a text; beside another model with --compare."""
    from ..answers.answer import Sampling
    from .generate_verb import Asked, run_generate

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    # a system prompt has no place without a chat template
    run_generate(Asked(model, revision, compare, chat or system is not None, system, dtype), prompt or (), prompts or (), sampling, as_json)


@app.command(epilog="Example: decoct chat served/ --system 'Answer in one sentence.'")
def chat(
    model: Model,
    system: System = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest answer.")] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "fp32",
    revision: Revision = None,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D ends; /new begins anew. From a pipe each line is a message."""
    from ..answers.answer import Sampling
    from .chat_verb import run_chat

    run_chat(model, revision, system, dtype, Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed))


@app.command(epilog="Example: decoct compare TEACHER STUDENT served/ --text 'held-out/*.txt' --html compared.html")
def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Model folders, hub ids or exports; the first is the reference.")],
    text: Text = None,
    hub: Hub = None,
    seq_length: SeqLength = 512,
    tokens: MeasuredTokens = None,
    tasks: Tasks = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with the table and a picture.")] = None,
) -> None:
    """Measure models on the same text: size, perplexity and KL with their errors, top-1 agreement, speed here, tasks, in one table."""
    from .compare_verb import run_compare
    from .stage_recipes import TextChoice

    run_compare(models, TextChoice(text, hub, seq_length, tokens), tasks or (), as_json=as_json, page=html)
