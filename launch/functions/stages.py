"""The verbs as functions: each builds the recipe that its verb builds, runs it, and returns folder and figures.

``data`` is the text: a file, glob or folder, a list of them, or a dict as the recipe's section ``data`` (``{"hub": ...}``, ``{"source":
...}``). None is the Python standard library, for trying out. Further keyword arguments are settings of the stage or of the recipe, as
KEY=VALUE of the verb: ``learning_rate=1e-4``, ``trainer={"precision": "32"}``, ``imports="my_parts.py"``. All raise what ``decoct.run``
raises.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...models.common.errors import UserError
from ..cli.stage_recipes import TextChoice, evaluation, export_model, prune_settings, qat_settings, quantize_settings, read_verb
from .arguments import as_files, as_model, as_out, as_path
from .results import EvaluationResult, ExportedModel, ModelResult, RunResult
from .run import pairs, started

Model = str | os.PathLike[str]
"""Model folder, .gguf file or hub id; a result of another function stands for its model folder."""
Data = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, Any] | None
Out = str | os.PathLike[str] | None


def distill(
    student: Model,
    teacher: Model,
    data: Data = None,
    *,
    tokens: int | str | None = None,
    seq_length: int = 512,
    out: Out = None,
    quiet: bool = False,
    **settings: Any,
) -> ModelResult:
    """Train ``student`` to predict what ``teacher`` predicts.

    Args:
        student: The model to train.
        teacher: The model to learn from.
        data: The text; see above.
        tokens: Training tokens, such as 500_000 or "2M". Default: 1M, unless ``steps`` is given.
        seq_length: Tokens per window.
        out: Run folder. Default: ``runs/distill-STUDENT``.
        quiet: Print nothing.
        settings: Settings of the stage or the recipe.
    """
    return _stage("distill", student, {"tokens": tokens}, data, seq_length, teacher, out, quiet, settings)


def prune(
    model: Model,
    data: Data = None,
    *,
    ffn: int | None = None,
    shape: Mapping[str, int] | str | None = None,
    budget: float | str | None = None,
    keep: float | str | None = None,
    method: str | None = None,
    pattern: str | None = None,
    teacher: Model | None = None,
    tokens: int | str | None = None,
    seq_length: int = 512,
    out: Out = None,
    quiet: bool = False,
    **settings: Any,
) -> ModelResult:
    """Cut the model to a smaller shape (``ffn``, ``shape``, ``budget``), or set weights to zero (``keep``, ``pattern``).

    Args:
        model: The model to prune.
        data: The text; see above.
        ffn: FFN channels that are kept in every layer. Give this, ``shape``, ``budget``, or ``keep`` or ``pattern``.
        shape: What is kept along each axis, any of ffn, heads, kv_heads, hidden and layers: ``{"heads": 24, "layers": 28}``.
        budget: Size of the result, whose shape is searched: a share of the decoder layers' parameters (0.6), parameters ("80M") or bytes
            as served ("900MB").
        keep: Share of the linear weights that is kept, such as 0.7 or "70%".
        method: How weights are chosen: "magnitude" (the default), or "wanda" or "sparsegpt" on the text, in one shot, or "movement"
            while it trains.
        pattern: N:M, such as "2:4": of each M consecutive inputs of a row N weights are kept.
        teacher: The model to learn from while it trains. Default: ``model`` as it is.
        tokens: Training tokens: of the schedule, or of the rounds of a cut to ``ffn`` or ``shape``, which removes at most 30 % in each.
        seq_length: Tokens per window.
        out: Run folder. Default: ``runs/prune-MODEL``.
        quiet: Print nothing.
        settings: Settings of the stage or the recipe.
    """
    made = prune_settings(ffn, keep, tokens, shape, method=method, pattern=pattern, budget=budget, in_python=True)
    return _stage("prune", model, made, data, seq_length, teacher, out, quiet, settings)


def qat(
    model: Model,
    data: Data = None,
    *,
    bits: int | str = 4,
    budget: float | str | None = None,
    group_size: int | str = 128,
    teacher: Model | None = None,
    tokens: int | str | None = None,
    train: str = "all",
    start: str | None = None,
    lora: int | None = None,
    seq_length: int = 512,
    out: Out = None,
    quiet: bool = False,
    **settings: Any,
) -> ModelResult:
    """Train ``model`` with rounded weights. Without ``teacher`` it learns from the unrounded model.

    Args:
        model: The model to train.
        data: The text; see above.
        bits: Bits per weight; "auto" gives each module a width within ``budget``.
        budget: With "auto": bits per weight, scales counted, or bytes of the model as served, such as "60MB".
        group_size: Input features per scale, or "channel".
        teacher: The model to learn from.
        tokens: Training tokens. Default: 1M, unless ``steps`` is given.
        train: "all", or "scales" alone.
        start: First scales: "rtn", "mse" or "gptq". Default: "gptq"; "mse" with ``lora``.
        lora: Rank of an adapter that is trained instead of the weights.
        seq_length: Tokens per window.
        out: Run folder. Default: ``runs/qat-MODEL``.
        quiet: Print nothing.
        settings: Settings of the stage or the recipe.
    """
    made = qat_settings(tokens, bits, group_size, train, start, lora, budget)
    return _stage("qat", model, made, data, seq_length, teacher, out, quiet, settings)


def quantize(
    model: Model,
    data: Data = None,
    *,
    method: str = "rtn",
    bits: int | str = 4,
    budget: float | str | None = None,
    group_size: int | str = 128,
    transform: str | None = None,
    calibration_tokens: int | str | None = None,
    teacher: Model | None = None,
    seq_length: int = 512,
    out: Out = None,
    quiet: bool = False,
    **settings: Any,
) -> ModelResult:
    """Round the weights of ``model`` without training.

    Args:
        model: The model to round.
        data: The text to calibrate and measure on; see above.
        method: "rtn" (to nearest), "mse" (searched scales) or "gptq" (calibrated on text).
        bits: Bits per weight; "auto" gives each module a width within ``budget``.
        budget: With "auto": bits per weight, scales counted, or bytes of the model as served, such as "60MB".
        group_size: Input features per scale, or "channel".
        transform: "awq", "smoothquant" or "rotation", before rounding. Default: none.
        calibration_tokens: Tokens to calibrate on. Default: 262,144.
        teacher: The model to compare with.
        seq_length: Tokens per window.
        out: Run folder. Default: ``runs/quantize-MODEL``.
        quiet: Print nothing.
        settings: Settings of the stage or the recipe.
    """
    made = quantize_settings(method, bits, group_size, calibration_tokens, budget, transform)
    return _stage("quantize", model, made, data, seq_length, teacher, out, quiet, settings)


def evaluate(
    model: Model,
    data: Data = None,
    *,
    teacher: Model | None = None,
    tokens: int | str | None = None,
    tasks: Sequence[str] = (),
    max_perplexity_increase: float | str | None = None,
    seq_length: int = 512,
    out: Out = None,
    quiet: bool = False,
    **settings: Any,
) -> EvaluationResult:
    """Measure a model folder or export: perplexity, KL and top-1 agreement with a teacher, sizes, scores on tasks.

    Args:
        model: The model or export.
        data: The text to measure on; see above.
        teacher: The model to compare with.
        tokens: Tokens to measure on. Default: all of the given files, 32k of anything else.
        tasks: Tasks to score: "cloze", .jsonl files of questions and answers, names of lm-eval.
        max_perplexity_increase: Gate: the largest increase over the teacher's perplexity, such as 0.05 or "5%".
        seq_length: Tokens per window.
        out: Run folder. Default: ``runs/evaluate-MODEL``.
        quiet: Print nothing.
        settings: Settings of the stage or the recipe.

    Raises:
        GateFailed: the gate is not met.
    """
    text, given = _text(data, seq_length, None if tokens is None else str(tokens))
    text, made = evaluation(text, max_perplexity_increase, tasks)
    done = _run("evaluate", model, made, text, teacher, out, quiet, {**given, **settings})
    rows = done.report["stages"]
    return EvaluationResult(figures=rows[-1], teacher=rows[0] if rows[0]["kind"] == "teacher" else None, run=done)


def export(
    model: Model,
    out: str | os.PathLike[str],
    format: str = "compressed-tensors",
    *,
    allow_inexact: bool = False,
    reader_version: str | None = None,
) -> ExportedModel:
    """Pack a quantized folder for serving stacks, and check the result with an independent reader.

    Args:
        model: Quantized model folder, or a plain one for plain formats.
        out: Folder to write; must not exist.
        format: As ``decoct export --format``.
        allow_inexact: Round plain weights that the format cannot hold exactly.
        reader_version: compressed-tensors version that will read the export; needed for 3, 5, 6 and 7 bits.

    Raises:
        UserError: the format cannot hold the weights, or ``out`` exists.
    """
    folder = Path(as_path(out, "out", "a folder"))
    made = export_model(Path(as_model(model, "model")), folder, format, allow_inexact, reader_version)
    return ExportedModel(folder=folder, format=format, bytes=made.bytes, exact=made.rounding is None, runtimes=made.runtimes)


def _stage(
    kind: str, model: Model, made: dict[str, Any], data: Data, seq_length: int, teacher: Model | None, out: Out, quiet: bool,
    settings: Mapping[str, Any],
) -> ModelResult:  # fmt: skip
    text, given = _text(data, seq_length)
    done = _run(kind, model, made, text, teacher, out, quiet, {**given, **settings})
    row = done.report["stages"][-1]
    return ModelResult(folder=done.folder / row["name"] / "model", figures=row, run=done)


def _run(
    kind: str, model: Model, made: dict[str, Any], text: TextChoice, teacher: Model | None, out: Out, quiet: bool,
    settings: Mapping[str, Any],
) -> RunResult:  # fmt: skip
    named = as_model(model, "student" if kind == "distill" else "model")
    # told here, where it is an argument; the verb speaks of its option
    if kind == "distill" and not teacher:
        raise UserError("distill needs a teacher to learn from: decoct.distill(student, teacher, data)")
    recipe = read_verb(kind, named, made, text, None if teacher is None else as_model(teacher, "teacher"), pairs(settings))
    return started(recipe, as_out(out), quiet=quiet)


def _text(data: Data, seq_length: int, tokens: str | None = None) -> tuple[TextChoice, dict[str, Any]]:
    """The text as a verb takes it, and what a dict says beyond that."""
    if isinstance(data, Mapping):
        return TextChoice(None, None, seq_length, tokens), {"data": data}
    return TextChoice(as_files(data), None, seq_length, tokens), {}
