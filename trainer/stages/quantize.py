"""Stage `quantize`: round the weights without training: to nearest, with searched scales, or by GPTQ on calibration text."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...models.calibration.error_report import error_lines
from ...models.capabilities import percent
from ...models.common.errors import UserError
from ...models.common.files import scratch_directory, sha256_file
from ...models.families import decoder_linears
from ...models.folder.loading import load_config, load_model
from ...models.folder.model_folder import save_model_folder
from ...models.folder.streaming import can_stream, empty_model
from ...qat.codes.state import QUANT_FILE, QuantState
from ...qat.importance import importance_of
from ...qat.layers.save_folder import STORED, round_unquantized
from ...qat.layers.targets import targets
from ...qat.ptq import CalibrationText, RoundedModel, amount_of_work, round_model
from ...qat.spec import QuantSpec
from ...qat.transforms.limits import transform_notes, transform_refusal
from ..evaluation.figures import exact_products
from ..progress import token_progress
from ..rounding_settings import rounding_of, wants_streaming
from ..settings_quantization import QuantizeSettings, SchemeSettings
from .bit_choice import choice_facts, settle
from .calibration import text_record, told_text
from .context import StageContext, StageResult
from .coverage import check_coverage, coverage_facts
from .saving import stage_record
from .student_and_teacher import current_device, stored_parameters
from .zeros import input_record, input_zeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# lines printed; the record has all notes
_NOTES_TOLD = 5


@dataclass(frozen=True)
class RoundingSource:
    """The model to round."""

    model: "PreTrainedModel"
    """fp32 in host memory, or on the meta device when it is streamed."""
    streaming: dict[str, Any]
    """Arguments of ``round_model`` with the places to read from and to write to; {} when the model is in memory."""


def finish(settings: QuantizeSettings, context: StageContext, trained: None) -> StageResult:
    """Round, fold and write the quantized folder (rank 0)."""
    started = time.perf_counter()
    # before widths are chosen, which takes minutes and writes a file
    _check_transform(settings, context)
    asked, settings = settings, settle(settings, context)
    check_coverage(context, allow_partial=settings.allow_partial, skip=settings.skip)
    with _opened(settings, context) as source:
        text = stage_text(settings, context, source.model) if settings.calibrates else None
        rounded = round_and_tell(settings, context, source, text)
        record = rounding_record(settings, text, rounded) | (chosen := choice_facts(asked, context))
        # inside the block: streamed layers are in its scratch folder until they are copied into the output
        save_quantized(source.model, rounded.state, context, {}, rounding=record)
        facts = coverage_facts(context, "quantized", rounded.state.modules)
    return StageResult(model=context.model, seconds=time.perf_counter() - started, facts={**facts, **chosen})


def _check_transform(settings: QuantizeSettings, context: StageContext) -> None:
    """Refuse what the family cannot do before weights are read, and say what a transform leaves as it is."""
    if settings.transform is None:
        return
    config = load_config(context.input, revision=context.input_revision)
    if reason := transform_refusal(settings.transform, config, sparse=bool(input_record(context))):
        raise UserError(f"{context.name}: transform {settings.transform.method}: {reason}")
    for note in transform_notes(settings.transform, config, embedding=settings.embedding is not None):
        context.say(f"  {note}")


def rounding_record(settings: QuantizeSettings, text: CalibrationText | None, rounded: RoundedModel) -> dict[str, Any]:
    """The ``quant.rounding`` entry of decoct.json: how codes and scales were found, and the relative errors."""
    names = ("mix", "method", "scale", "damping", "activation_order", "weighted")
    record: dict[str, Any] = {name: value for name in names if (value := getattr(settings, name)) is not None}
    if settings.importance is not None:
        file = Path(settings.importance)
        record["importance"] = {"file": file.name, "sha256": sha256_file(file)}
    if rounded.transform:
        record["transform"] = rounded.transform
    if text is not None:
        record["calibration"] = text_record(text)
    record["relative_error"] = {
        kind: {"linears": error.linears, "rounded": error.relative, "to_nearest": error.relative_baseline}
        for kind, error in rounded.errors.items()
    }
    if rounded.outliers:
        record["outlier_columns"] = outlier_shares(rounded.outliers)
    return {**record, "notes": rounded.notes}


def outlier_shares(outliers: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """Share of the input columns that hold an outlier on the calibration text, by kind of linear ('' = all of them)."""
    counts: dict[str, list[int]] = {"": [0, 0]}
    for name, found in outliers.items():
        for kind in ("", name.rpartition(".")[2]):
            sums = counts.setdefault(kind, [0, 0])
            sums[:] = [sums[0] + found[0], sums[1] + found[1]]
    return {kind: some / whole for kind, (some, whole) in counts.items()}


@contextmanager
def _opened(settings: QuantizeSettings, context: StageContext) -> Iterator[RoundingSource]:
    """The stage's input, whole in host memory or streamed layer by layer. Rounded layers stay on disk until the block ends."""
    if not _streams(settings, context):
        # fp32 in memory: GPTQ subtracts small errors from weights, which bf16 would lose
        yield RoundingSource(load_model(context.input, dtype=torch.float32, revision=context.input_revision), {})
        return
    with scratch_directory(context.folder / "layers") as work:
        model, files = empty_model(context.input, context.input_revision)
        with files:
            yield RoundingSource(model, {"files": files, "work": work})


def _streams(settings: QuantizeSettings, context: StageContext) -> bool:
    if settings.stream == "never" or not wants_streaming(settings, stored_parameters(context.input, context.input_revision)):
        return False
    # the memory is short or the user asks for it; the files decide whether it is possible
    if can_stream(context.input, context.input_revision):
        context.say("  layer by layer, from its files and to new ones")
        return True
    if settings.stream == "always":
        raise UserError(
            f"{context.name}: stream: always, but the files of {context.input} do not hold the weights under the names of the model's "
            "modules, so that they cannot be read one by one; save the model with decoct or transformers first, or use stream: never"
        )
    context.say("  memory is short, but the model's files can only be read whole: their tensor names differ from its module names")
    return False


def stage_text(settings: QuantizeSettings, context: StageContext, model: "PreTrainedModel") -> CalibrationText:
    """Calibration text of the stage.

    Raises:
        UserError: GPTQ gets fewer tokens than the widest layer has inputs, or packed windows do not suit the model (``check_packing``).
    """
    assert settings.calibration_tokens is not None
    widths = {name: target.module.weight.shape[1] for name, target in targets(model, settings.scheme).items()}
    # only GPTQ needs as many tokens as a layer has inputs
    whole = rounding_of(settings).needs == "hessian"
    transform = None if whole or settings.transform is None else settings.transform.method
    return told_text(
        context,
        model,
        settings.calibration_tokens,
        method=transform or settings.method,
        widths=widths if whole else None,
        otherwise="leave transform out" if transform else "use method mse",
    )


def round_and_tell(
    settings: QuantizeSettings,
    context: StageContext,
    source: RoundingSource,
    text: CalibrationText | None,
    others: torch.dtype | None = STORED,
) -> RoundedModel:
    """Round the model in place with a progress bar, and print the errors. ``others`` is the dtype to which other weights are rounded."""
    rounding, device = rounding_of(settings), current_device()
    total = amount_of_work(source.model, settings.scheme, rounding, (), text)
    unit = "weights" if text is None else "layer tokens"
    # no TF32 and no autocast, so that the same text gives the same Hessian whatever training used
    with token_progress(context.run.console, context.name, total, unit) as advance, exact_products(device.type):
        rounded = round_model(
            source.model,
            settings.scheme,
            rounding,
            sparse=input_zeros(context, source.model),
            text=text,
            device=device,
            others=others,
            importance=_importance(settings, source.model),
            seed=context.run.seed,
            advance=advance,
            **source.streaming,
        )
    for line in transform_words(rounded.transform):
        context.say(f"  {line}")
    words = [scheme_words(map(rounded.state.spec_of, rounded.state.modules)), f"by {settings.method}", *beside_words(settings)]
    context.say("  " + ", ".join(words))
    for line in error_lines(rounded.errors, rounding.needs != "nothing" or settings.importance is not None):
        context.say(f"    {line}")
    if rounded.outliers and settings.activations is not None:
        shares = outlier_shares(rounded.outliers)
        each = ", ".join(f"{kind} {percent(share)}" for kind, share in shares.items() if kind)
        large = f"inputs of at least {settings.activations.outliers:g}, which stay in 16 bits"
        context.say(f"  {large}, are in {percent(shares[''])} of the columns ({each})")
    # a large model can have hundreds of notes; decoct.json has all of them
    for note in rounded.notes[:_NOTES_TOLD]:
        context.say(f"  {note}")
    if len(rounded.notes) > _NOTES_TOLD:
        context.say(f"  and {len(rounded.notes) - _NOTES_TOLD} more notes in decoct.json (quant.rounding.notes)")
    return rounded


def _importance(settings: QuantizeSettings, model: "PreTrainedModel") -> "dict[str, torch.Tensor]":
    if settings.importance is None:
        return {}
    inputs = {name: linear.in_features for name, linear in decoder_linears(model).items()}
    found = importance_of(settings.importance, model.config.model_type, inputs)
    # a copy: torch does not take the read-only memory of a file
    return {name: torch.from_numpy(values.copy()) for name, values in found.items()}


def scheme_words(specs: Iterable[QuantSpec]) -> str:
    """Number of modules for each quantization spec, the most common first."""
    counts = Counter(specs)
    return ", ".join(f"{count} modules in {spec.words()}" for spec, count in counts.most_common())


def transform_words(record: Mapping[str, Any]) -> Iterator[str]:
    """What a transform did, a line for each thing; nothing without one."""
    for producer, told in record.get("scaled", {}).items():
        least, most = told["scales"]
        error = f", error of the outputs {told['error']:.2f} of that without" if "error" in told else ""
        yield f"{record['method']}: {producer}, scales from {least:.3g} to {most:.3g}{error}"
    for what, words in (("residual", "residual stream"), ("heads", "heads")):
        if made := record.get(what):
            yield f"rotated the {words}: Hadamard matrix of order {made['size']} = {made['hadamard']}, seed {record['seed']}"
    if record.get("untied"):
        yield "the output head has weights of its own from here on: it was tied to the embedding"


def beside_words(settings: SchemeSettings) -> list[str]:
    """One phrase each for quantized inputs and for quantized keys and values."""
    both = {"inputs": settings.activations, "keys and values": settings.kv_cache}
    return [f"{what} in {spec.kind}, {spec.scaling}" for what, spec in both.items() if spec]


def save_quantized(
    model: "PreTrainedModel", state: QuantState, context: StageContext, facts: dict[str, Any], rounding: dict[str, Any] | None = None
) -> None:
    """Write code * scale in fp32 under the original names, and codes and scales in quant/codes.safetensors.

    Args:
        model: Folded model: its weights are code * scale.
        state: Codes and scales.
        context: Context of the stage.
        facts: Further entries of decoct.json.
        rounding: How codes and scales were found (``rounding_record``).
    """
    # weights without codes go to the precision in which an export stores them
    round_unquantized(model, state)
    quant = {**state.record(), **({"rounding": rounding} if rounding else {})}
    save_model_folder(
        context.model,
        model,
        context.run.tokenizer,
        stage_record(context, {**facts, "quant": quant}),
        dtype=torch.float32,
        extra_tensors={QUANT_FILE: state.tensors()},
    )
