"""Stage `qat`: train with rounded weights. The result is codes and scales, which exporters only rearrange."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...models.folder.codes_file import codes_file
from ...models.folder.loading import load_config, load_model
from ...models.folder.meta import meta_model
from ...models.folder.model_folder import save_model_folder
from ...qat.codes.state import QUANT_FILE, load_quant_state
from ...qat.layers.codes_linear import CodesLinear
from ...qat.layers.input_hooks import round_inputs
from ...qat.layers.kv_cache_hooks import round_cache
from ...qat.layers.quant_linear import Extras, RoundedWeight
from ...qat.layers.quantized_model import fold, hold_codes, prepare, quantize_model
from ...qat.layers.targets import check_zeros_held, targets
from ...qat.ptq import RoundingMethod, round_model
from ..loop.qat_schedule import FirstGrid, QatSchedule
from ..settings_quantization import QatSettings
from .bit_choice import choice_facts, settle
from .context import StageContext, StageResult, StudentRounders, Trained
from .coverage import check_coverage, coverage_facts
from .quantize import RoundingSource, beside_words, round_and_tell, save_quantized, scheme_words, stage_text
from .saving import stage_record
from .student_and_teacher import OpenStudent, open_student
from .training import train_student, training_plan
from .zeros import input_zeros, keep_zeros_hooks, tell_unlisted_zeros

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_START = "start"
_BESIDE_ZERO = 1e-3
"""Factor on a kept weight whose code is zero: it starts near zero, without becoming an exact zero."""


def start(settings: QatSettings, context: StageContext) -> None:
    """Round with GPTQ on rank 0, before all ranks train, into a folder that a resumed run reads again.

    Latent weights start as code times scale, the centre of their rounding cell, so that a code changes only under a persistent gradient.
    If they started as near to the original weights as their codes allow, those that GPTQ moved would lie at the edge of a cell, and the
    first steps would undo its choice.
    """
    # a width for every module comes first, and the other ranks find it in the folder
    settings = settle(settings, context)
    check_coverage(context, allow_partial=settings.allow_partial, skip=settings.skip)
    folder = context.folder / _START
    rounding = settings.start_rounding
    # a resumed run must continue from the same codes
    if rounding is None or folder.exists():
        return
    if _continues(settings, context):
        context.say("  starts from the codes of its input, which has this scheme already")
        return
    model = load_model(context.input, dtype=torch.float32, revision=context.input_revision)
    trains = settings.train == "all"
    if trains:
        tell_unlisted_zeros(context, model)
    # copies from before the rounding, which changes the model in place
    sparse = _weights(model, input_zeros(context, model) if trains else ())
    # kinds other than int compute their scales in each forward pass, so they start from the original weights
    plain = [name for name, target in targets(model, settings.scheme).items() if target.spec.kind != "int"]
    others = _weights(model, plain if trains else ())
    text = stage_text(rounding, context, model)
    # others=None: what is not quantized trains on in fp32, so it is not rounded to the dtype of exports yet
    rounded = round_and_tell(rounding, context, RoundingSource(model, {}), text, others=None)
    for name, before in sparse.items():
        # exact zeros are the pruning mask: a kept weight that rounds to zero must not look pruned
        weight = model.get_parameter(f"{name}.weight").data
        weight.copy_(torch.where((weight == 0) & (before != 0), before * _BESIDE_ZERO, weight))
    for name, before in others.items():
        model.get_parameter(f"{name}.weight").data.copy_(before)
    record = stage_record(context, {"quant": rounded.state.record()})
    tensors = {QUANT_FILE: rounded.state.tensors()}
    # one rename: a kill before it rounds again, a kill after it finds the folder above
    save_model_folder(folder, model, context.run.tokenizer, record, dtype=torch.float32, extra_tensors=tensors)


def _weights(model: "PreTrainedModel", modules: Iterable[str]) -> dict[str, "Tensor"]:
    """Detached copies of the weights of modules, by module name."""
    return {name: model.get_parameter(f"{name}.weight").detach().clone() for name in modules}


def train(settings: QatSettings, context: StageContext) -> Trained:
    """Train latent weights, or only the scales, through linears that round their weights."""
    settings = settle(settings, context)
    # all ranks read what rank 0 has written in ``start``
    opened = replace(context, input=str(_first_codes(context)), input_revision=None) if settings.first == "gptq" else context
    student = open_student(settings, opened)
    if settings.train == "scales":
        modules = _hold_codes(settings, student, context)
        _announce(settings, student, context)
        rounders = _hook(settings, student, modules)
        plan = training_plan(settings, context, student)
        rounds = rounders.inputs is not None or rounders.cache is not None
        # codes stay as they are, so zeros need no hook; the schedule is there for the ranges of inputs, keys and values alone
        hooks = [QatSchedule(settings, plan.total_steps, plan.seed, inputs=rounders.inputs, cache=rounders.cache)] if rounds else []
        return train_student(student, settings, context, plan, hooks=hooks, rounders=rounders)
    if settings.first != "gptq" and not settings.lora:
        tell_unlisted_zeros(context, student.model)
    extras = Extras(scale=settings.scales == "learned" or settings.freeze_scales > 0, rank=settings.lora or 0)
    check_zeros_held({name: one.spec for name, one in targets(student.model, settings.scheme).items()}, input_zeros(context, student.model))
    # before the optimizer is built: scales and adapters become parameters of the student here
    modules = prepare(student.model, settings.scheme, extras=extras)
    _announce(settings, student, context)
    plan = training_plan(settings, context, student)
    # without these, the schedule would search new scales and lose the choice of GPTQ
    given = _given_grids(_first_codes(context)) if settings.first == "gptq" else None
    rounders = _hook(settings, student, modules)
    schedule = QatSchedule(settings, plan.total_steps, plan.seed, given, inputs=rounders.inputs, cache=rounders.cache)
    # `context`, not `opened`: the record of zeros is that of the stage's own input
    hooks = [*keep_zeros_hooks(context, student.model), schedule]
    return train_student(student, settings, context, plan, hooks=hooks, rounders=rounders)


def finish(settings: QatSettings, context: StageContext, trained: Trained | None) -> StageResult:
    """Derive codes and scales from the trained student, fold them into its weights, and write the quantized folder (rank 0)."""
    assert trained is not None
    asked, settings = settings, settle(settings, context)
    inputs, cache = trained.rounders.inputs, trained.rounders.cache
    # the codes come from the rounding of the trained forward pass, and nothing rounds after them (law 3, docs/architecture.md)
    state = quantize_model(trained.student, settings.scheme)
    if inputs is not None:
        state = replace(state, activations=inputs.spec, input_scales=inputs.scales(), input_zeros=inputs.zeros())
    if cache is not None:
        state = replace(state, cache=cache.state())
    # after the state: folding replaces the rounding linears that it is read from
    fold(trained.student, state)
    chosen = choice_facts(asked, context)
    save_quantized(trained.student, state, context, {**trained.facts, **chosen})
    covered = {**coverage_facts(context, "quantized", state.modules), **chosen}
    return StageResult(model=context.model, tokens=trained.tokens, seconds=trained.seconds, facts={**covered, **trained.watched()})


def _hold_codes(settings: QatSettings, student: OpenStudent, context: StageContext) -> tuple[str, ...]:
    if settings.first == "gptq":
        state = load_quant_state(_first_codes(context))
    else:
        sparse = input_zeros(context, student.model)
        state = round_model(student.model, settings.scheme, RoundingMethod(method=settings.first), sparse=sparse).state
    hold_codes(student.model, state)
    return state.modules


def _hook(settings: QatSettings, student: OpenStudent, modules: Collection[str]) -> StudentRounders:
    """Attach the hooks that round inputs, keys and values, as far as the settings ask for them."""
    inputs = round_inputs(student.model, modules, settings.activations) if settings.activations else None
    cache = round_cache(student.model, settings.kv_cache) if settings.kv_cache else None
    return StudentRounders(inputs, cache)


def _continues(settings: QatSettings, context: StageContext) -> bool:
    """Whether the input holds codes of the same scheme, as after a stage `quantize`: rounding its weights again would change none.

    Not with a pruning mask, because a kept weight whose code is zero can no longer be told from a pruned one, and not with rounded
    inputs, keys and values.
    """
    folder = Path(context.input)
    if settings.activations is not None or settings.kv_cache is not None or not (folder / "config.json").is_file():
        return False
    if codes_file(folder) is None or input_zeros(context, model := meta_model(load_config(folder))):
        return False
    state = load_quant_state(folder)
    beside = state.activations is not None or state.cache is not None
    asked = {name: target.spec for name, target in targets(model, settings.scheme).items()}
    return not beside and asked == {name: state.spec_of(name) for name in state.modules}


def _first_codes(context: StageContext) -> Path:
    """The folder with the codes that training starts from: what ``start`` wrote, or the input."""
    folder = context.folder / _START
    return folder if folder.exists() else Path(context.input)


def _given_grids(folder: Path) -> dict[str, FirstGrid]:
    """Scales and zero points of a folder's codes, by module. The weights of the same folder are the latent weights."""
    from safetensors.torch import load_file

    suffix = ".scale"
    file = codes_file(folder)
    assert file is not None, f"{folder} was written without codes"
    tensors = load_file(file)
    modules = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    return {name: (tensors[name + suffix], tensors.get(f"{name}.zero_point")) for name in modules}


def _announce(settings: QatSettings, student: OpenStudent, context: StageContext) -> None:
    modules = [module for module in student.model.modules() if isinstance(module, RoundedWeight | CodesLinear)]
    learned = settings.scales == "learned" and any(module.spec.kind == "int" for module in modules)
    trained = "scales alone train" if settings.train == "scales" else "learned scales" if learned else "absmax scales"
    more = beside_words(settings)
    more += [f"start {settings.first}"] if learned else []
    more += [f"adapters of rank {settings.lora}"] if settings.lora else []
    more += [f"annealed from {settings.anneal_from} bits"] if settings.anneal_from else []
    context.say("  " + ", ".join([scheme_words(module.spec for module in modules), trained, *more]))
