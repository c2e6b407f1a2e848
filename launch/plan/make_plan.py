"""Makes the plan of a recipe from shapes alone, in seconds."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...losses.settings_own import OwnLossSettings
from ...qat.transforms.limits import transform_notes
from ...trainer.processes.teacher_memory import teacher_bytes
from ...trainer.stage_plan import derive_plan, derive_steps, held_teacher, learns_from, trains, wanted_strategy
from .disk import checkpoint_bytes, model_bytes, quantized_bytes
from .duration import Speed
from .export_sizes import export_bytes, tokenizer_folder
from .family_limits import check_families, coverage
from .feature_memory import feature_case
from .fitting import cheapest_fit, usable
from .format_limits import format_problems, planned_model
from .input_models import check_inputs
from .machine import planned_machine
from .memory import training_memory
from .memory_case import StageMemoryCase
from .plan_types import PRECISIONS, Machine, Plan, StagePlan, Training
from .quantized_shapes import quantized_linears
from .recipe_remedies import Keys, RecipeRemedies
from .rounding import rounding_plan
from .sampling_cost import SamplingCase, sampling_cost
from .serving_stacks import Verdict, verdicts
from .shape_budgets import round_notes, search_notes
from .shapes import ModelShape
from .stage_shapes import StageShape, broken_pattern, makes_own_model, shape_notes, stage_shapes, student_shape, teacher_shape
from .stage_time import StageWork, timed, training_step
from .text_disk import blend_notes, tokenized_bytes
from .values import Value, mix_values, recipe_values, settings_values, training_values
from .work import cache_work

if TYPE_CHECKING:
    from ...configs.recipe import Recipe, StageEntry
    from ...models.settings import LoadIn
    from ...trainer.plan import TrainingPlan
    from ...trainer.settings_quantization import QuantizeSettings
    from ...trainer.soft_targets.row_layout import HiddenLayout, RowLayout


def plan(
    recipe: "Recipe",
    *,
    gpus: int | None = None,
    gpu_memory: int | None = None,
    nodes: int = 1,
    tensor_parallel: int = 1,
    speed: Speed | None = None,
) -> Plan:
    """Plan a recipe.

    Args:
        recipe: The recipe.
        gpus: GPUs per node; None: those of this machine, as selected by ``trainer.devices``.
        gpu_memory: Bytes of one GPU; None: those of the GPU in ``speed``, or of this machine's GPU, unknown without one.
        nodes: Machines.
        tensor_parallel: GPUs that will serve one copy of the exported model.
        speed: What is known of speed and price; None: this machine's GPU, if ``gpus`` knows it.

    Raises: UserError if a model's config cannot be found, or the recipe contradicts itself.
    """
    # from cheap to expensive, and each step needs the one before: files, configs, families, then every stage
    check_inputs(recipe)
    machine, speed = planned_machine(recipe.trainer, gpus, gpu_memory, nodes, speed or Speed())
    teacher = teacher_shape(recipe)
    student = student_shape(recipe, teacher)
    check_families(recipe, teacher, student)
    found = [_stage(recipe, shape, teacher, machine, tensor_parallel) for shape in stage_shapes(recipe, student)]
    stages, cost = timed([stage for stage, _ in found], [work for _, work in found], machine, speed)
    # stages keep their folders for resuming, so sizes add up over the run
    kept = sum((stage.model_bytes or 0) + sum(stage.exports.values()) for stage in stages)
    largest = max((stage.training.checkpoint_bytes * stage.training.checkpoints for stage in stages if stage.training), default=0)
    passing = max((stage.rounding.work_bytes for stage in stages if stage.rounding), default=0)
    # a student that is given lies where it is; one that is made is stored as 00-student
    made = 0 if recipe.student.path else model_bytes(student, _SAVED[recipe.trainer.save_dtype])
    return Plan(
        name=recipe.name,
        machine=machine,
        teacher=None if teacher is None else f"{teacher.describe()}, {teacher.parameters:,} parameters",
        student=f"{student.describe()}, {student.parameters:,} parameters ({student.source})",
        values=recipe_values(recipe),
        imports=[file.words() for file in recipe.imports],
        stages=stages,
        cost=cost,
        tokenized_bytes=tokenized_bytes(recipe.data),
        # only one stage trains at a time
        disk_bytes=kept + made + passing + largest + sum(stage.training.cache_bytes for stage in stages if stage.training),
    )


_SAVED = {"bf16": "BF16", "fp32": "F32"}


def _stage(
    recipe: "Recipe", shape: StageShape, teacher: ModelShape | None, machine: Machine, tensor_parallel: int
) -> tuple[StagePlan, StageWork]:
    from ...trainer.settings import ExportSettings
    from ...trainer.settings_own import OwnStageSettings
    from ...trainer.settings_pruning import PruneSettings
    from ...trainer.settings_quantization import QatSettings, QuantizeSettings

    entry, after = shape.entry, shape.after
    # as the recipe has them: widths that stand in for a choice are no settings
    values = settings_values(f"stages.{entry.index}.{entry.kind}", shape.asked or entry.settings)
    notes: list[str] = []
    training, work = None, StageWork(imported=isinstance(entry.settings, OwnStageSettings))
    if trains(entry.settings):
        training, derived, notes, work = _training(recipe, shape, teacher, machine)
        # a derived value replaces the setting it was derived for (auto, or none)
        values = derived + [value for value in values if value.key not in {other.key for other in derived}]
        notes = [*blend_notes(recipe.data, training.tokens), *notes]
    if isinstance(entry.settings, QatSettings | QuantizeSettings) and entry.settings.mix and shape.scheme is not None:
        # the mixture decides ``weights``
        values = [value for value in values if ".weights." not in value.key] + mix_values(entry, quantized_linears(after, shape.scheme))
    if isinstance(entry.settings, PruneSettings) and entry.settings.structured:
        structured = entry.settings.structured
        notes += [*search_notes(shape.before, structured), *round_notes(shape.before, entry.settings), *shape_notes(after, structured.kept)]
        notes += broken_pattern(recipe, entry, dict.fromkeys(structured.axes, 0))
    if isinstance(entry.settings, QuantizeSettings) and entry.settings.transform is not None:
        notes += transform_notes(entry.settings.transform, shape.before.config, embedding=entry.settings.embedding is not None)
    rounding, rounded = None, entry.settings
    if isinstance(entry.settings, QatSettings):
        # qat rounds before it trains, and that is the peak of its memory on a small GPU
        rounded = None if shape.continues else entry.settings.start_rounding
    if isinstance(rounded, QuantizeSettings):
        seq, memory = recipe.data.seq_length, machine.gpu_memory
        rounded = _calibrated(rounded, recipe)
        rounding = rounding_plan(rounded, shape, seq, on_gpu=machine.gpus > 0, gpu_memory=memory)
    exports: dict[str, int] = {}
    judged: Sequence[Verdict] = ()
    refused: list[str] = []
    if isinstance(entry.settings, ExportSettings) and shape.scheme is not None:
        beside = {"activations": shape.activations, "kv_cache": shape.kv_cache}
        tokenizer = tokenizer_folder(recipe)
        exports = {name: export_bytes(name, after, shape.scheme, **beside, tokenizer=tokenizer) for name in entry.settings.formats}
        remedies = RecipeRemedies(after, shape.scheme, tuple(exports), _keys(recipe, entry))
        stored = planned_model(
            remedies,
            **beside,
            reader_version=entry.settings.reader_version,
            allow_inexact=entry.settings.allow_inexact,
        )
        judged = verdicts(stored, remedies, tensor_parallel=tensor_parallel)
        refused = format_problems(stored, remedies)
    planned = StagePlan(
        name=entry.name,
        kind=entry.kind,
        shape=after.describe(),
        parameters=after.parameters,
        precisions={name: int(after.parameters * width) for name, width in PRECISIONS.items()},
        model_bytes=_written(recipe, shape),
        training=training,
        rounding=rounding,
        values=values,
        exports=exports,
        verdicts=list(judged),
        refusals=refused,
        notes=[*notes, *([shape.note] if shape.note else [])],
        coverage=coverage(shape),
        # told at the stage that quantizes, not after it at an export that cannot be written
        not_exported=shape.after.family.refusal("export") or "" if entry.kind in ("qat", "quantize") else "",
    )
    return planned, work


def _calibrated(rounding: "QuantizeSettings", recipe: "Recipe") -> "QuantizeSettings":
    """Return the settings with no more calibration tokens than the model of the recipe writes; other text is not counted by a plan."""
    asked, held = recipe.data.generate, recipe.data.eval_tokens
    if asked is None or not isinstance(held, int) or rounding.calibration_tokens is None:
        return rounding
    return replace(rounding, calibration_tokens=min(rounding.calibration_tokens, max(1, asked.tokens - held)))


def _keys(recipe: "Recipe", export: "StageEntry") -> Keys:
    """Return the key prefixes for remedies: of the export, of the last rounding stage before it, and of the one that prunes channels."""
    from ...trainer.settings_pruning import PruneSettings
    from ...trainer.settings_quantization import QatSettings, QuantizeSettings

    kinds = Counter(entry.kind for entry in recipe.stages)

    def key(entry: "StageEntry") -> str:
        # a kind that is there once needs no position
        return f"stages.{entry.kind if kinds[entry.kind] == 1 else entry.name}."

    # remedies must change the stages that this export reads, not later ones
    before = recipe.stages[: export.index]
    rounding = [entry for entry in before if isinstance(entry.settings, QatSettings | QuantizeSettings)]
    pruning = [entry for entry in before if isinstance(entry.settings, PruneSettings) and entry.settings.structured]
    return Keys(quantizer=key(rounding[-1]) if rounding else "", export=key(export), prune=key(pruning[-1]) if pruning else None)


def _written(recipe: "Recipe", shape: StageShape) -> int | None:
    # codes and a plain fp32 model lie next to each other in a quantized folder
    if shape.entry.kind in ("qat", "quantize"):
        assert shape.scheme is not None
        return sum(quantized_bytes(shape.after, shape.scheme))
    if shape.entry.kind in ("pretrain", "distill", "prune") or makes_own_model(shape.entry.settings):
        return model_bytes(shape.after, _SAVED[recipe.trainer.save_dtype])
    return None


def _training(
    recipe: "Recipe", shape: StageShape, teacher: ModelShape | None, machine: Machine
) -> tuple[Training, list[Value], list[str], StageWork]:
    """Return memory, derived numbers, what can never act, and work of one training stage."""
    from ...trainer.processes.strategy import choose_strategy

    entry, trainer, seq = shape.entry, recipe.trainer, recipe.data.seq_length
    held = held_teacher(entry.settings, recipe.teacher, name=entry.name)
    # teacher 'input' is the model that the stage gets
    taught = None if held is None else shape.before if held.whose == "input" else teacher
    load_in, placement = (held.load_in, held.placement) if held else ("bf16", "replicated")
    # the run's own rule: another strategy would need another amount of memory
    strategy = choose_strategy(
        wanted_strategy(entry.settings, trainer, name=entry.name),
        ranks=machine.ranks,
        parameters=shape.before.parameters,
        optimizer=trainer.optimizer,
        teacher_bytes=0 if taught is None else teacher_bytes(taught.as_teacher, load_in, placement, machine.ranks),
        device_bytes=machine.gpu_memory,
    )
    steps = derive_plan(
        entry.settings,
        trainer,
        derive_steps(entry.settings, trainer, name=entry.name, seq_length=seq, ranks=machine.ranks, seed=recipe.seed),
        kind=entry.kind,
        hidden=shape.before.hidden,
        strategy=strategy,
    )
    case = StageMemoryCase(
        plan=steps,
        seq_length=seq,
        ranks=machine.ranks,
        own_loss=isinstance(getattr(entry.settings, "loss", None), OwnLossSettings),
        nodes=machine.nodes,
        on_gpu=machine.gpus > 0,
        load_in=load_in,
        placement=placement,
        scheme=shape.scheme if entry.kind == "qat" else None,
        scored=entry.kind == "prune" and entry.settings.movement is not None,
        features=None if taught is None else feature_case(entry, shape.before, taught),
        **_trained_in_qat(entry.settings),
    )
    drawing = None
    if entry.settings.samples is not None:
        sampled = SamplingCase(
            settings=entry.settings.samples, plan=steps, seq_length=seq, packed=recipe.data.packing, chat=recipe.data.has_chats,
            ranks=machine.ranks,
        )  # fmt: skip
        drawing = sampling_cost(sampled, shape.before, taught, load_in)
        case = replace(case, drawn=drawing.memory)
    memory = training_memory(shape.before, taught, case)
    fits = None if machine.gpu_memory is None else memory.total <= usable(machine.gpu_memory)
    # steps are whole, so there may be a few more tokens than asked
    tokens = steps.total_steps * steps.batch.global_windows * seq
    # a cached teacher is here only while the cache is filled
    cached = recipe.teacher is not None and recipe.teacher.cache is not None and held is not None and held.whose == "recipe"
    step = training_step(entry.name, shape.before, None if cached else taught, case)
    filled = cache_work(taught, seq, load_in) * tokens if cached and taught is not None else None
    # zeros made by a prune stage are kept by every later one, and so its masks are in their checkpoints
    masks = entry.kind == "prune" or any(e.kind == "prune" and e.settings.weights for e in recipe.stages[: entry.index])
    layout = _cache_layout(recipe, entry, teacher)
    training = Training(
        steps=steps.total_steps,
        tokens=tokens,
        flop=step.work.total * tokens,
        memory=memory,
        fits=fits,
        remedy=cheapest_fit(shape.before, taught, case, machine.gpu_memory) if fits is False and machine.gpu_memory else None,
        checkpoint_bytes=checkpoint_bytes(shape.before, masks=masks, scored=case.scored),
        # two are kept, with result: best also the best one, and one more exists while it is written
        checkpoints=4 if entry.settings.result == "best" else 3,
        # no token is seen twice at most
        cache_bytes=0 if layout is None else layout.bytes * tokens,
        cache=_cache_words(layout, load_in),
        sampling=drawing,
    )
    values = training_values(entry, steps, seq, machine.ranks, shape.before.hidden, trainer, continues=shape.continues)
    return training, values, _idle(entry.settings, steps, trainer.evaluate_every), StageWork(step=step, cache=filled, sampling=drawing)


def _idle(settings: Any, steps: "TrainingPlan", every: Any) -> list[str]:
    # 0 is refused when the recipe is read
    if not settings.selects or every == 0:
        return []
    from ...trainer.loop.standing import deciding_every, never_acts

    return never_acts(steps, deciding_every(every, steps.total_steps))


def _trained_in_qat(settings: Any) -> dict[str, Any]:
    from ...trainer.settings_quantization import QatSettings

    if not isinstance(settings, QatSettings):
        return {}
    inputs = settings.activations
    rounds = {"rounds_inputs": inputs is not None, "keeps_outliers": inputs is not None and inputs.outliers is not None}
    return {"learned_scales": settings.scales == "learned", "codes_only": settings.train == "scales", "rank": settings.lora or 0, **rounds}


def _cache_layout(recipe: "Recipe", entry: "StageEntry", teacher: ModelShape | None) -> "RowLayout | HiddenLayout | None":
    """Return the layout of the teacher's cache for a stage; None if it reads none."""
    from ...trainer.soft_targets.row_layout import cache_layout

    if teacher is None or recipe.teacher is None or recipe.teacher.cache is None:
        return None
    if learns_from(entry.settings, has_teacher=True) != "recipe":
        return None
    return cache_layout(recipe.teacher.cache, teacher.vocabulary, teacher.head_width, entry.settings.loss.temperature or 1.0)


def _cache_words(layout: "RowLayout | HiddenLayout | None", load_in: "LoadIn") -> str:
    """Return what a token takes in the cache, and what follows from it; '' without one."""
    from ...trainer.soft_targets.row_layout import HiddenLayout

    if layout is None:
        return ""
    if not isinstance(layout, HiddenLayout):
        return f"{layout.top + layout.others} tokens per position, {layout.bytes:,} bytes; forward KL"
    error = "0" if layout.exact(load_in) else "measured when it is filled"
    return f"last hidden states in {layout.states}, {layout.bytes:,} bytes per position; every divergence, KL(cache || teacher) {error}"
