"""Lists every value that a run uses, with its origin: the recipe, a default, or a rule."""

from collections import Counter
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from ... import recipe_key
from ...trainer.learning_rates import BASE_HIDDEN, BASE_RATES, FAR_KL, LORA_FACTOR, SCALE_RATE_SHARE
from ...trainer.plan import MICRO_BATCH_TOKENS, WARMUP
from ...trainer.settings_quantization import QatSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...configs.recipe import Recipe, StageEntry
    from ...trainer.plan import TrainingPlan
    from .quantized_shapes import Quantized


@dataclass(frozen=True)
class Value:
    """One value."""

    key: str
    """Key path as in overrides, or the name of a derived number below it."""
    value: Any
    origin: str
    """Origin: recipe, default, or the rule."""


def recipe_values(recipe: "Recipe") -> list[Value]:
    """Return all settings of teacher, student, data and trainer; the settings of a stage are listed with the stage."""
    found = [Value("seed", recipe.seed, "recipe" if recipe.seed else "default")]
    for section in ("teacher", "student", "data", "trainer"):
        settings = getattr(recipe, section)
        if settings is not None:
            found += settings_values(section, settings)
    return found


def settings_values(prefix: str, settings: Any) -> list[Value]:
    """Return the fields of a settings dataclass and of the sections in it, without those that are None."""
    found: list[Value] = []
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        default = (
            # a default that is a section or list is made by a factory; comparing with it tells whether the recipe gave another value
            entry.default if entry.default is not MISSING else entry.default_factory() if entry.default_factory is not MISSING else None
        )
        if is_dataclass(value):
            found += settings_values(f"{prefix}.{entry.name}", value)
        # a list of sections, such as callbacks
        elif isinstance(value, tuple) and value and all(map(is_dataclass, value)):
            found += [line for index, one in enumerate(value) for line in settings_values(f"{prefix}.{entry.name}.{index}", one)]
        # None is "not set": what is derived in its place is listed with its rule
        elif value is not None:
            # a field that must be given has no default that could be filled in
            filled = entry.default is None and _filled(settings, entry.name)
            found.append(Value(f"{prefix}.{recipe_key(entry.name)}", value, "default" if value == default or filled else "recipe"))
    return found


def _filled(settings: Any, name: str) -> bool:
    """Return whether a settings dataclass itself gives a field the value that it has, where the field's own default is None."""
    try:
        return getattr(replace(settings, **{name: None}), name) == getattr(settings, name)
    except ValueError:
        # the rest needs this field
        return False


def mix_values(entry: "StageEntry", quantized: "Mapping[str, Quantized]") -> list[Value]:
    """Return what a mixture makes of a model, as the number of matrices of each kind."""
    counts = Counter(one.spec.words() for one in quantized.values())
    words = ", ".join(f"{count} in {kind}" for kind, count in counts.most_common())
    return [Value(f"stages.{entry.index}.{entry.kind}.mix matrices", words, f"the rules of llama.cpp for {entry.settings.mix}")]


def training_values(
    entry: "StageEntry", plan: "TrainingPlan", seq_length: int, ranks: int, hidden: int, wanted: Any, *, continues: bool
) -> list[Value]:
    """Return the derived numbers of a training stage.

    Args:
        wanted: The recipe's ``TrainerSettings``, whose ``auto`` is decided here.
        continues: Whether a qat stage starts from the codes of the stage before it (``StageShape.continues``).
    """
    settings, batch = entry.settings, plan.batch
    step_tokens = batch.global_windows * seq_length
    prefix = f"stages.{entry.index}.{entry.kind}"
    # the rule of ``trainer/learning_rates.py`` in words
    rate = f"{BASE_RATES[entry.kind]:g} x {BASE_HIDDEN} / hidden {hidden:,}"
    if isinstance(settings, QatSettings):
        rate += f" x 2^(3 - bits {settings.weights.bits})" + (f" x {LORA_FACTOR} for adapters" if settings.lora else "")
    if plan.rate_from_start:
        rate += f" x sqrt(KL of the first step / {FAR_KL:g}), at most this"
    steps = "recipe" if settings.steps is not None else f"tokens {settings.tokens:,} / {step_tokens:,} a step, rounded up"
    return [
        Value(f"{prefix}.steps", plan.total_steps, steps),
        Value(f"{prefix}.tokens", plan.total_steps * step_tokens, f"{plan.total_steps:,} steps x {step_tokens:,}"),
        Value(f"{prefix}.learning_rate", plan.learning_rate, rate if settings.learning_rate is None else "recipe"),
        *_scale_rate(prefix, settings, plan),
        *_start(prefix, settings, continues=continues),
        Value(f"{prefix}.warmup steps", plan.warmup_steps, _warmup_words(settings, plan)),
        Value(
            f"{prefix}.checkpoint_every",
            plan.checkpoint_every,
            "recipe" if settings.checkpoint_every else "a twentieth of the steps, at least 10",
        ),
        Value(
            "trainer.micro_batch",
            batch.micro_batch,
            f"the largest number of windows that fits into {MICRO_BATCH_TOKENS:,} tokens and divides a rank's share"
            if wanted.micro_batch == "auto"
            else "recipe",
        ),
        Value("micro-batches a step", batch.accumulation, f"{batch.global_windows} windows / {ranks} processes / micro_batch"),
        Value(
            "trainer.strategy",
            plan.strategy if ranks > 1 else "one process",
            "recipe" if wanted.strategy != "auto" else "fsdp2 if ddp would fill more than 60 % of a GPU",
        ),
    ]


def _start(prefix: str, settings: Any, *, continues: bool) -> list[Value]:
    """Return how a qat stage finds its first scales, if that is derived."""
    if not isinstance(settings, QatSettings) or (settings.start is not None and not continues):
        return []
    if continues:
        return [Value(f"{prefix}.start", "input", "the codes of the stage before it, which has this scheme")]
    why = "learned scales; weights train from the first step at the final bits" if settings.first == "gptq" else "of these settings"
    return [Value(f"{prefix}.start", settings.first, why)]


def _warmup_words(settings: Any, plan: "TrainingPlan") -> str:
    if settings.warmup is not None:
        return "recipe"
    return f"{WARMUP:.0%} of the steps" if plan.warmup == WARMUP else "8 steps, or half of the steps of a stage with fewer than 16"


def _scale_rate(prefix: str, settings: Any, plan: "TrainingPlan") -> list[Value]:
    if not isinstance(settings, QatSettings) or plan.scale_learning_rate is None:
        return []
    derived = f"learning_rate / {1 / SCALE_RATE_SHARE:.0f}"
    return [Value(f"{prefix}.scale_learning_rate", plan.scale_learning_rate, "recipe" if settings.scale_learning_rate else derived)]
