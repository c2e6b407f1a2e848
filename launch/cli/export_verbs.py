"""The verbs that write and check exports, and ``doctor``. Nothing heavy is imported here."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Hub, MeasuredTokens, Model, Out, SeqLength, StageOverrides, Tasks, Teacher, Text

app = typer.Typer()

_FORMATS = (
    "Format to write: compressed-tensors (vLLM, SGLang, transformers), gguf (llama.cpp), gguf-q2_0 (2 bits, llama.cpp from July 2026 on), "
    "gguf-tq1_0 (ternary codes, the smaller form), "
    "gptq, gptq_v2 (asymmetric), awq (4 bits), bitsandbytes (int8 with int8 inputs, or NF4), safetensors (plain 16-bit floats), "
    "safetensors-f32 (plain, always exact); for plain weights also gguf-bf16, gguf-f16 or gguf-f32."
)


@app.command(epilog="Example: decoct export runs/quickstart/05-qat/model --out served/")
def export(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="Quantized model folder (made by qat or quantize), or a plain one for gguf-f16 and other plain formats."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")],
    form: Annotated[str, typer.Option("--format", help=_FORMATS)] = "compressed-tensors",
    allow_inexact: Annotated[
        bool, typer.Option("--allow-inexact", help="Round plain weights that the format cannot hold exactly.")
    ] = False,
    reader_version: Annotated[
        str | None,
        typer.Option(
            "--reader-version",
            help="compressed-tensors version that will read the export (0.18.0 or later); needed for 3, 5, 6 and 7 bits.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Pack a quantized folder for serving stacks, and check the result with an independent reader."""
    from .single_stage import run_export

    run_export(model, out, form, allow_inexact, reader_version)


@app.command(epilog="Example: decoct plain google/gemma-3-4b-it --out gemma-3-4b-text")
def plain(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Hub revision of MODEL.")] = None,
) -> None:
    """Make a plain text model for the other verbs from a model of text and images, an adapter, or fp8 or bitsandbytes weights."""
    from .single_stage import run_plain

    run_plain(model, out, revision)


@app.command(
    "import", epilog="Example: decoct import model-Q4_K_M.gguf --out model    or: decoct import base/ --adapter lora/ --out merged"
)
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A .gguf file or a folder with one, a LoRA adapter of peft, a folder with .bin weights, or any model with --adapter.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")],
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Folder of a LoRA adapter to merge into SOURCE.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Dtype of the weights: fp32, bf16 or fp16.", show_default="the exact values: fp32 for GGUF blocks"),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Folder or hub id whose tokenizer is used in place of that of a GGUF file.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Hub revision of SOURCE.")] = None,
) -> None:
    """Make a plain model folder of weights in another form: GGUF, a model with an adapter, or pickled files."""
    from .single_stage import run_import

    run_import(source, out, adapter, dtype, tokenizer, revision)


@app.command(epilog="Example: decoct verify runs/quickstart/06-export/compressed-tensors")
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Export folder, a .gguf file, or a model folder, such as a pruned one.")],
    source: Annotated[
        Path | None,
        typer.Option(
            "--source",
            help="Quantized folder that the export was made from, or parent that a model was cut from; compared element by element.",
        ),
    ] = None,
    runtimes: Annotated[
        bool, typer.Option("--runtimes/--no-runtimes", help="Also load the export, or run the cut model, in the installed runtimes.")
    ] = True,
    accept: Annotated[
        list[str] | None, typer.Option("--accept", help="A file that you changed on purpose: record its present content; repeatable.")
    ] = None,
) -> None:
    """Check an export or a pruned model: file hashes, structure, scales, cuts, zeros, and what the installed runtimes compute from it."""
    from .single_stage import run_verify

    run_verify(folder, source, runtimes, accept or ())


@app.command(epilog="Example: decoct evaluate served/ --teacher big/ --text 'held-out/*.txt'")
def evaluate(
    model: Model,
    overrides: StageOverrides = None,
    teacher: Teacher = None,
    text: Text = None,
    hub: Hub = None,
    seq_length: SeqLength = 512,
    tokens: MeasuredTokens = None,
    max_perplexity_increase: Annotated[str | None, typer.Option(help="Gate: exit code 3 above this increase, such as 5%.")] = None,
    tasks: Tasks = None,
    out: Out = None,
) -> None:
    """Measure a model folder or export: perplexity, KL and top-1 agreement with a teacher, calibration, size, scores on tasks."""
    from .single_stage import run_evaluate
    from .stage_recipes import TextChoice

    run_evaluate(model, TextChoice(text, hub, seq_length, tokens), teacher, max_perplexity_increase, overrides, out, tasks or ())


@app.command(epilog="Example: decoct doctor")
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, combinations with known problems, and what is missing for each verb."""
    from ..doctor.doctor import run_doctor

    run_doctor(as_json)
