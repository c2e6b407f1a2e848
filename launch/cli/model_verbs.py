"""The verbs that make one model from another: a recipe of one stage each. Nothing heavy is imported here."""

from typing import Annotated

import typer

from .options import Bits, Budget, GroupSize, Hub, Model, Out, SeqLength, StageOverrides, Teacher, Text, Tokens, TrainTokens

app = typer.Typer()


@app.command(epilog="Example: decoct distill student/ --teacher HuggingFaceTB/SmolLM2-1.7B --text 'corpus/*.jsonl' --tokens 10M")
def distill(
    model: Model,
    overrides: StageOverrides = None,
    teacher: Teacher = None,
    text: Text = None,
    hub: Hub = None,
    tokens: TrainTokens = None,
    seq_length: SeqLength = 512,
    out: Out = None,
) -> None:
    """Train MODEL to predict what a teacher predicts."""
    from .single_stage import run_verb
    from .stage_recipes import TextChoice

    run_verb("distill", model, {"tokens": tokens}, TextChoice(text, hub, seq_length), teacher, overrides, out)


@app.command(
    epilog="Example: decoct prune student/ --shape ffn=384,layers=8    or: decoct prune student/ --method wanda --keep 0.5 --text x.txt"
)
def prune(
    model: Model,
    overrides: StageOverrides = None,
    ffn: Annotated[int | None, typer.Option("--ffn", help="FFN channels kept in every layer (the model gets smaller).")] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", help="What is kept along each axis, any of: ffn=6144,heads=24,kv=6,hidden=3072,layers=28."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", help="Size of the result, whose shape is searched: 0.6 of the decoder layers, 80M parameters, or 900MB as served."
        ),
    ] = None,
    keep: Annotated[str | None, typer.Option("--keep", help="Share of the linear weights that is kept, such as 0.7 or 70%.")] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="With --keep or --pattern: magnitude, wanda, sparsegpt or movement.", show_default="magnitude"),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="Pattern N:M, such as 2:4 = of each 4 consecutive inputs of a row 2 weights are kept.")
    ] = None,
    teacher: Teacher = None,
    text: Text = None,
    hub: Hub = None,
    tokens: Tokens = None,
    seq_length: SeqLength = 512,
    out: Out = None,
) -> None:
    """Cut MODEL to a smaller shape (--ffn, --shape, --budget), or set weights to zero (--keep, --pattern). On a schedule with --tokens."""
    from .single_stage import run_verb
    from .stage_recipes import TextChoice, prune_settings

    settings = prune_settings(ffn, keep, tokens, shape, method=method, pattern=pattern, budget=budget)
    run_verb("prune", model, settings, TextChoice(text, hub, seq_length), teacher, overrides, out)


@app.command(epilog="Example: decoct qat student/ --teacher big/ --bits 4 --group-size 64 --tokens 5M")
def qat(
    model: Model,
    overrides: StageOverrides = None,
    bits: Bits = "4",
    budget: Budget = None,
    group_size: GroupSize = "128",
    teacher: Teacher = None,
    text: Text = None,
    hub: Hub = None,
    tokens: TrainTokens = None,
    train: Annotated[
        str, typer.Option("--train", help="What is trained: all, or scales (only the scales; codes are fixed, one byte per weight).")
    ] = "all",
    start: Annotated[
        str | None,
        typer.Option("--start", help="First scales: rtn, mse (searched) or gptq.", show_default="gptq; mse with --lora"),
    ] = None,
    lora: Annotated[int | None, typer.Option("--lora", help="Rank of an adapter that is trained instead of the weights.")] = None,
    seq_length: SeqLength = 512,
    out: Out = None,
) -> None:
    """Train MODEL with rounded weights. Without --teacher it learns from the unrounded MODEL."""
    from .single_stage import run_verb
    from .stage_recipes import TextChoice, qat_settings

    settings = qat_settings(tokens, bits, group_size, train, start, lora, budget)
    run_verb("qat", model, settings, TextChoice(text, hub, seq_length), teacher, overrides, out)


@app.command(epilog="Example: decoct quantize student/ --method gptq --bits 4 --group-size 64 --text 'corpus/*.txt'")
def quantize(
    model: Model,
    overrides: StageOverrides = None,
    method: Annotated[
        str, typer.Option("--method", help="rtn (round to nearest), mse (searched scales) or gptq (calibrated on text).")
    ] = "rtn",
    bits: Bits = "4",
    budget: Budget = None,
    group_size: GroupSize = "128",
    transform: Annotated[
        str | None,
        typer.Option(
            "--transform", help="Before rounding: awq, smoothquant or rotation. It leaves the unrounded model's outputs as they are."
        ),
    ] = None,
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
    """Round the weights of MODEL without training; --method gptq and --transform awq calibrate on text, one layer at a time."""
    from .single_stage import run_verb
    from .stage_recipes import TextChoice, quantize_settings

    settings = quantize_settings(method, bits, group_size, calibration_tokens, budget, transform)
    run_verb("quantize", model, settings, TextChoice(text, hub, seq_length), teacher, overrides, out)
