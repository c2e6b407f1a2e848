"""A width for every module, chosen by sensitivity within a budget, before the stage works: ``weights: {bits: auto, budget: 3.5}``.

The choice is written into the stage's folder first and read from there ever after. So a resumed run, and every rank, goes on with the same
widths and does not search again.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from ...losses.divergences import forward_kl
from ...models.calibration.calibration_text import CalibrationText
from ...models.common.errors import UserError
from ...models.common.files import write_json_atomic
from ...models.families import decoder_layers, decoder_linears
from ...models.folder.loading import load_model
from ...qat.auto_weights import WeightSettings
from ...qat.bit_assignment import BudgetError, Problem, Shapes, problem_of, scheme_fields
from ...qat.bit_table import choice_lines
from ...qat.layers.targets import targets
from ...qat.ptq.sensitivity import Losses, Sensitivity, amount_of_work
from ...qat.spec import QuantSpec
from ...qat.stored_bytes import packed_matrix_bytes
from ..evaluation.figures import exact_products
from ..plan import derive_seed
from ..progress import token_progress
from ..rounding_settings import wants_streaming
from ..settings_quantization import QatSettings, QuantizeSettings
from .calibration import told_text
from .context import StageContext
from .exact_rows import ExactRows
from .student_and_teacher import current_device, stored_parameters
from .zeros import input_zeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "bits.json"
"""The choice, in the stage's folder."""
_EXACT = "bits-exact.json"
"""Exact figures of the groups so far, until the choice is written."""
_SHARE_OF_GPU = 0.6
"""Most of the free GPU memory that fp32 weights may take; the rest is for a layer's activations and the logits."""
Settings = TypeVar("Settings", QatSettings, QuantizeSettings)
Record = dict[str, Any]


def settle(settings: Settings, context: StageContext) -> Settings:
    """The settings with a width for every module, as ordinary ``weights``, ``overrides`` and ``skip``.

    Read from the stage's folder, or chosen and written there. Settings that name their bits are returned as they are.

    Raises:
        UserError: the budget is too small or too large, there is no calibration text, or memory is too small for the whole model.
    """
    if settings.auto is None:
        return settings
    record = choice_of(settings, context)
    if record is None:
        record = _choose(settings, settings.auto, context)
        # before any work: a run that is killed later goes on with these widths
        write_json_atomic(context.folder / FILE, record)
        (context.folder / _EXACT).unlink(missing_ok=True)
    specs = {name: None if fields is None else QuantSpec.from_json(fields) for name, fields in record["modules"].items()}
    shapes: Shapes = {name: tuple(size) for name, size in record["shapes"].items()}
    weights, overrides, left = scheme_fields(specs, shapes)
    return replace(settings, weights=weights, overrides=overrides, skip=(*settings.skip, *left))


def choice_of(settings: QatSettings | QuantizeSettings, context: StageContext) -> Record | None:
    """The choice in the stage's folder; None if there is none yet, or the settings name their bits."""
    file = context.folder / FILE
    if settings.auto is None or not file.is_file():
        return None
    try:
        record: Record = json.loads(file.read_text(encoding="utf-8"))
        # a stage whose settings have changed has another key, and chooses again
        same = record["key"] == context.key and bool(record["modules"]) and bool(record["shapes"])
    except (ValueError, TypeError, KeyError, RecursionError):
        context.say(f"  {file.name} is damaged; widths are chosen again")
        return None
    return record if same else None


def choice_facts(settings: QatSettings | QuantizeSettings, context: StageContext) -> Record:
    """What the stage's record and the report say of the choice: {"bits": ...}; {} if there was none."""
    record = choice_of(settings, context)
    return {} if record is None else {"bits": {name: value for name, value in record.items() if name not in ("key", "shapes", "modules")}}


def _choose(settings: QatSettings | QuantizeSettings, auto: WeightSettings, context: StageContext) -> Record:
    if isinstance(settings, QuantizeSettings) and wants_streaming(settings, stored_parameters(context.input, context.input_revision)):
        raise UserError(
            f"{context.name}: weights.bits=auto looks at the whole model in fp32, for which memory is too small here; take a machine with "
            "more memory, or give weights.bits and overrides"
        )
    model = load_model(context.input, dtype=torch.float32, revision=context.input_revision)
    scheme = settings.scheme_with(auto.base)
    # the checks of the stage itself, before the work
    checked = targets(model, scheme)
    linears = decoder_linears(model)
    shapes: Shapes = {name: (linear.weight.shape[0], linear.weight.shape[1]) for name, linear in linears.items()}
    ends = {id(target.module.weight): target.spec for name, target in checked.items() if name not in linears}
    rest = _rest(model, {id(linears[name].weight) for name in checked if name in linears}, ends)
    try:
        problem = problem_of(auto, scheme, shapes, rest)
    except BudgetError as error:
        raise UserError(f"{context.name}: weights.{error}") from error
    assert auto.sensitivity_tokens is not None and auto.sensitivity is not None
    text = told_text(
        context, model, auto.sensitivity_tokens, method="weights.bits=auto", widths=None, otherwise="give weights.bits and overrides"
    )
    losses, tried = _measured(settings, auto, model, problem, text, context)
    used: Sequence[Sequence[float]] = getattr(losses, auto.sensitivity)
    best = min(tried, key=lambda one: one.kl)
    specs = problem.specs(best.chosen)
    # in module order, as everything that lists modules
    specs = {name: specs[name] for name in shapes if name in specs}
    taken = sum(packed_matrix_bytes(shapes[name], spec) for name, spec in specs.items())
    record: Record = {
        "key": context.key,
        "budget": auto.limit.words(),
        "bits_per_weight": problem.bits(taken),
        "bytes": rest + taken,
        "sensitivity": auto.sensitivity,
        "tokens": text.tokens,
        "estimated_kl": sum(row[at] for row, at in zip(used, best.chosen)),
        "calibration_kl": {one.name: one.kl for one in tried},
        "chosen_by": best.name,
        "rank_correlation": _correlations(losses),
        "widths": {name: 16 if spec is None else spec.bits for name, spec in specs.items()},
        "candidates": [16 if one is None else one.bits for one in auto.candidates],
        "losses": {"+".join(choice.modules): list(row) for choice, row in zip(problem.free, used)},
        "modules": {name: None if spec is None else spec.to_json() for name, spec in specs.items()},
        "shapes": {name: list(shapes[name]) for name in specs},
    }
    for line in choice_lines(record):
        context.say(f"  {line}")
    return record


def _rest(model: "PreTrainedModel", chosen: Collection[int], ends: Mapping[int, QuantSpec]) -> int:
    """Bytes of all parameters but the ``chosen``, as served: embedding and head by their specs (``ends``), everything else in 16 bits."""
    # ``parameters`` yields a tied tensor once
    return sum(packed_matrix_bytes(p.shape, ends.get(id(p))) for p in model.parameters() if id(p) not in chosen)


@dataclass(frozen=True)
class _Tried:
    """An assignment that meets the budget, and what it costs."""

    name: str
    """The estimate that it is the optimum of, or 'N bits everywhere'."""
    chosen: list[int]
    """Candidate of each free choice."""
    kl: float
    """KL in nats per token on the calibration text, all modules rounded."""


def _measured(
    settings: QatSettings | QuantizeSettings, auto: WeightSettings, model: "PreTrainedModel", problem: Problem, text: CalibrationText,
    context: StageContext,
) -> tuple[Losses, list[_Tried]]:  # fmt: skip
    """The losses of every group at every width, and what assignments within the budget cost together."""
    candidates = {name: [one[name] for one in choice.specs] for choice in problem.free for name in choice.modules}
    runs = len(problem.free) * sum(one is not None for one in auto.candidates) if auto.sensitivity == "exact" else 0
    layers = len(decoder_layers(model))
    total = amount_of_work(layers, text.tokens, runs)
    device, console = _device(model), context.run.console
    model.to(device)  # pyright: ignore[reportArgumentType] - torch's stubs know no device here
    with token_progress(console, f"{context.name}: sensitivity", total, "layer tokens") as advance, exact_products(device.type):
        sensitivity = Sensitivity(
            model,
            [choice.modules for choice in problem.free],
            candidates,
            text,
            method=settings.method if isinstance(settings, QuantizeSettings) else settings.first,
            vocabulary=context.run.v_eff,
            # the same recipe draws the same directions
            seed=derive_seed(context.run.seed, "sensitivity"),
            device=device,
            sparse=input_zeros(context, model),
            advance=advance,
        )
        losses = sensitivity.measure(forward_kl if auto.sensitivity == "exact" else None, ExactRows(context.folder / _EXACT, context.key))
    named = _assignments(auto, problem, losses)
    total = layers * text.tokens * len(named)
    with token_progress(console, f"{context.name}: assignments", total, "layer tokens") as advance, exact_products(device.type):
        tried = [_Tried(name, at, sensitivity.rounded_together(problem.specs(at), forward_kl, advance)) for name, at in named.items()]
    return losses, tried


def _assignments(auto: WeightSettings, problem: Problem, losses: Losses) -> dict[str, list[int]]:
    """The optimum of each estimate, the asked one first, and every width that fits as the only one. Losses of groups add up only while they
    are small, so what is best together is measured and not estimated."""
    asked: str = auto.sensitivity or "cheap"
    names = [asked, *(name for name in ("cheap", "second_order") if name != asked)]
    found = {name: problem.solve(getattr(losses, name)) for name in names}
    pinned = sum(choice.costs[0] for choice in problem.choices if len(choice.costs) == 1)
    for at, width in enumerate(auto.given_widths):
        if pinned + sum(choice.costs[at] for choice in problem.free) <= problem.room:
            found[f"{width} bits everywhere"] = [at] * len(problem.free)
    # an assignment that two estimates agree on is measured once
    return {name: at for place, (name, at) in enumerate(found.items()) if at not in list(found.values())[:place]}


def _device(model: "PreTrainedModel") -> torch.device:
    """The GPU if the whole model in fp32 fits beside its activations, else the CPU."""
    device = current_device()
    if device.type == "cuda" and 4 * model.num_parameters() > _SHARE_OF_GPU * torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def _correlations(losses: Losses) -> dict[str, float]:
    """Spearman's rank correlation of each two estimates over the groups, as the mean over the candidates that lose something."""
    found = {name: np.asarray(getattr(losses, name)) for name in ("cheap", "second_order", "exact") if getattr(losses, name)}
    pairs = {f"{a}, {b}": (found[a], found[b]) for at, a in enumerate(found) for b in list(found)[at + 1 :]}
    return {name: float(np.mean(columns)) for name, (a, b) in pairs.items() if (columns := _columns(a, b))}


def _columns(a: "np.ndarray[Any, Any]", b: "np.ndarray[Any, Any]") -> list[float]:
    # a candidate that is left alone loses nothing in any group, and has no order
    wanted = [column for column in range(a.shape[1]) if a[:, column].any() and len(a) > 1]
    return [rank_correlation(a[:, column], b[:, column]) for column in wanted]


def rank_correlation(a: "np.ndarray[Any, Any]", b: "np.ndarray[Any, Any]") -> float:
    """Spearman's rank correlation of two lists of two or more different numbers."""
    apart = np.argsort(np.argsort(a)) - np.argsort(np.argsort(b))
    return float(1 - 6 * np.square(apart).sum() / (len(a) * (len(a) ** 2 - 1)))
