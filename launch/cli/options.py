"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped recipe.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, .gguf file or hub id.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides of the recipe, such as stages.0.learning_rate=1e-4.")
]
StageOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings of the stage or the recipe, such as learning_rate=1e-4 trainer.precision=32."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder.", show_default="runs/NAME")]
Teacher = Annotated[str | None, typer.Option("--teacher", help="Teacher: model folder, .gguf file or hub id.")]
Text = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="Text files (txt, jsonl, json, csv, parquet; also compressed), globs or folders; repeatable.",
        show_default="the Python standard library",
    ),
]
Hub = Annotated[str | None, typer.Option("--hub", help="Hugging Face dataset id, instead of --text.")]
Tokens = Annotated[str | None, typer.Option("--tokens", help="Training tokens, such as 500k or 2M.")]
TrainTokens = Annotated[str | None, typer.Option("--tokens", help="Training tokens, such as 500k or 2M.", show_default="1M")]
SeqLength = Annotated[int, typer.Option("--seq-length", help="Tokens per window.")]
Bits = Annotated[str, typer.Option("--bits", help="Bits per weight; auto = a width for each module within --budget.")]
Budget = Annotated[
    str | None,
    typer.Option("--budget", help="With --bits auto: bits per weight, scales counted (3.5), or bytes of the model as served (60MB)."),
]
GroupSize = Annotated[str, typer.Option("--group-size", help="Input features per scale, or 'channel' for one scale per output row.")]
MeasuredTokens = Annotated[
    str | None, typer.Option("--tokens", help="Tokens to measure on.", show_default="all of --text; 32k of anything else")
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        help="Tasks to score, with commas or repeatable: cloze, .jsonl files of questions and answers, names or YAML files of lm-eval.",
        show_default=False,
    ),
]
