"""The recipes of single verbs, one stage on a model folder each: for the verbs, and for the functions of the same names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.errors import UserError

if TYPE_CHECKING:
    from ...configs.overrides import Override
    from ...configs.own_parts import Tell
    from ...configs.recipe import Recipe
    from ...qat.export.export import ExportResult

DEFAULT_TOKENS = {"distill": "1M", "qat": "1M"}
"""Training tokens of a verb if neither tokens nor steps are given."""


@dataclass(frozen=True)
class TextChoice:
    """The text that a verb trains or measures on."""

    files: Sequence[str] | None
    hub: str | None
    seq_length: int
    eval_tokens: str | None = None

    def data(self) -> dict[str, Any]:
        """Return the ``data`` section of a recipe."""
        if self.files and self.hub:
            raise UserError("--text and --hub exclude each other; give one of them")
        source: dict[str, Any] = (
            {"files": list(self.files)} if self.files else {"hub": self.hub} if self.hub else {"builtin": "python-stdlib"}
        )
        measured = {"eval_tokens": self.eval_tokens} if self.eval_tokens else {}
        return {**source, "seq_length": self.seq_length, **measured}


_TEXTS = ("data.files", "data.hub", "data.generate", "data.source", "data.blend")


def verb_recipe(
    kind: str, model: str, settings: dict[str, Any], text: TextChoice, teacher: str | None, overrides: "Sequence[Override]" = ()
) -> dict[str, Any]:
    """Return the recipe, as plain data, that runs one stage of ``kind`` on ``model``.

    Args:
        kind: Kind of the stage.
        model: The model.
        settings: Settings of the stage; those that are None are left out.
        text: The text.
        teacher: The teacher, if any.
        overrides: What will be written into it: one that names a text replaces the built-in one.
    """
    from ...configs.overrides import key_of, value_of

    recipe: dict[str, Any] = {"name": f"{kind}-{_slug(model)}", "student": {"path": model}, "data": text.data()}
    # a section takes exactly one source of text
    if any(key_of(one) in _TEXTS for one in overrides):
        recipe["data"].pop("builtin", None)
    if teacher:
        recipe["teacher"] = {"path": teacher}
    # one window: the size of a step follows from all settings (`read_verb`), and the shortest text has to do here
    lengths = [value_of(one) for one in overrides if key_of(one) == "data.seq_length"]
    recipe["trainer"] = {"global_batch_tokens": lengths[-1] if lengths else text.seq_length}
    recipe["stages"] = [{kind: {k: v for k, v in settings.items() if v is not None}}]
    return recipe


def verb_overrides(kind: str, overrides: "Sequence[Override]") -> "list[Override]":
    """Convert KEY=VALUE of a single verb to overrides of its recipe: a key of the stage needs no prefix (``steps=9`` for
    ``stages.0.steps=9``).

    A top-level key of recipes (``teacher.load_in``, ``seed``) keeps its meaning. An unknown key goes where the most similar key is, so that
    the message can name that key; one like no other goes to the stage, whose keys the message then lists.
    """
    from ... import types_of
    from ...configs.foreign_names import meant_by
    from ...configs.overrides import key_of
    from ...configs.problems import nearest_name
    from ...configs.reading import KEYS
    from ...trainer.stages.registry import STAGE_KINDS

    # a key of the recipe's stays the recipe's, also where a stage has one of that name
    own = set(types_of(STAGE_KINDS[kind].settings)) - set(KEYS)

    def of_the_stage(key: str) -> bool:
        return key in own or (key not in KEYS and meant_by(key) is None and nearest_name(key, [*KEYS, *own]) not in KEYS)

    def addressed(one: "Override") -> "Override":
        if not of_the_stage(key_of(one).partition(".")[0].strip()):
            return one
        return f"stages.0.{one}" if isinstance(one, str) else (f"stages.0.{one[0]}", one[1])

    return [addressed(one) for one in overrides]


def _gives_steps(override: "Override") -> bool:
    from ...configs.overrides import key_of

    keys = key_of(override).split(".")
    return keys[0].strip() == "stages" and keys[-1].strip() == "steps"


def _slug(model: str) -> str:
    path = Path(model)
    # runs/x/01-distill/model is named by its stage, since all stages call their folder 'model'
    name = path.parent.name if path.name == "model" and path.parent.name else path.name
    # the name of a run, and so of a folder
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


ROUNDS = 0.3
"""Share of the decoder layers' parameters that a round removes, where a verb gets tokens for a cut of the shape."""
WEIGHT_METHODS = ("magnitude", "wanda", "sparsegpt", "movement")
"""Methods of the verb ``prune`` that set single weights to zero."""


def prune_settings(
    ffn: int | None,
    keep: float | str | None,
    tokens: int | str | None,
    shape: str | Mapping[str, int] | None = None,
    *,
    method: str | None = None,
    pattern: str | None = None,
    budget: float | str | None = None,
    in_python: bool = False,
) -> dict[str, Any]:
    """Return the settings of the ``prune`` stage for ``--ffn``, ``--shape`` or ``--budget``, or ``--keep`` or ``--pattern`` with a method.

    ``in_python``: messages speak of the function's arguments.
    """
    dashes, distill = ("", "decoct.distill") if in_python else ("--", "`decoct distill`")
    weights = keep is not None or pattern is not None
    if (ffn is not None) + (shape is not None) + (budget is not None) + weights != 1:
        raise UserError(
            f"give exactly one of {dashes}ffn (channels kept in every layer), {dashes}shape (what is kept along each axis), "
            f"{dashes}budget (the size, such as 0.6 or 80M) and "
            f"{dashes}keep (share of the weights that stays) or {dashes}pattern (such as 2:4)"
        )
    if not weights:
        what = "budget" if budget is not None else "ffn" if shape is None else "shape"
        if method is not None:
            raise UserError(f"{dashes}method chooses single weights and does not go with {dashes}{what}; leave one of them out")
        if budget is not None:
            if tokens is not None:
                raise UserError(f"{dashes}budget searches a shape and takes no {dashes}tokens; run {distill} on the result to recover")
            return {"structured": {"budget": budget}}
        kept = {"ffn": ffn} if shape is None else _shape(shape, dashes)
        return {"structured": kept} if tokens is None else {"structured": {**kept, "rounds": ROUNDS}, "tokens": tokens}
    method = method or "magnitude"
    if method not in WEIGHT_METHODS:
        raise UserError(f"{dashes}method {method}: there is no such method; give one of {', '.join(WEIGHT_METHODS)}")
    if method in ("wanda", "sparsegpt") and tokens is not None:
        raise UserError(
            f"{dashes}method {method} is one shot and takes no {dashes}tokens; run {distill} on the result, which keeps the zeros"
        )
    if method == "movement" and tokens is None:
        raise UserError(f"{dashes}method movement scores weights by how training moves them; give {dashes}tokens, such as 10M")
    given = {"keep": keep, "pattern": pattern}
    return {method: {key: value for key, value in given.items() if value is not None}, "tokens": tokens}


def _shape(given: str | Mapping[str, int], dashes: str) -> dict[str, Any]:
    """Return what is kept along each axis: of 'ffn=6144,heads=24,kv=6', or of a mapping."""
    from ...models.axis_map import AXES

    pairs: dict[str, Any] = dict(given) if not isinstance(given, str) else {}
    if isinstance(given, str):
        parts = [part.partition("=") for part in given.split(",") if part.strip()]
        pairs = {key: value for key, _, value in parts}
        names = [{"kv": "kv_heads"}.get(key.strip(), key.strip()) for key, _, _ in parts]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{dashes}shape {given!r} names {twice} twice; name each axis once")
    # kv is short for kv_heads
    named = {{"kv": "kv_heads"}.get(key.strip(), key.strip()): value for key, value in pairs.items()}
    wrong = [name for name in named if name not in AXES]
    if wrong or not named:
        what = f"{wrong[0]!r} is no axis" if wrong else "nothing is named"
        raise UserError(f"{dashes}shape {given!r}: {what}; name what is kept along ffn, heads, kv, hidden or layers, such as ffn=6144,kv=4")
    # the number is read, and its mistakes are told, as in a recipe
    return {name: value.strip() if isinstance(value, str) else value for name, value in named.items()}


def qat_settings(
    tokens: int | str | None,
    bits: int | str,
    group_size: int | str,
    train: str,
    start: str | None,
    lora: int | None,
    budget: float | str | None = None,
) -> dict[str, Any]:
    """Return the settings of the ``qat`` stage for the options of its verb."""
    return {"tokens": tokens, "weights": _weights(bits, group_size, budget), "train": train, "start": start, "lora": lora}


def quantize_settings(
    method: str,
    bits: int | str,
    group_size: int | str,
    calibration_tokens: int | str | None,
    budget: float | str | None = None,
    transform: str | None = None,
) -> dict[str, Any]:
    """Return the settings of the ``quantize`` stage for the options of its verb."""
    return {
        "method": method,
        "weights": _weights(bits, group_size, budget),
        "calibration_tokens": calibration_tokens,
        "transform": transform,
    }


def _weights(bits: int | str, group_size: int | str, budget: float | str | None) -> dict[str, Any]:
    # numbers may be text, as options give them; the recipe reads them
    return {"bits": bits, "group_size": group_size, **({} if budget is None else {"budget": budget})}


def evaluation(text: TextChoice, gate: float | str | None, tasks: Sequence[str]) -> tuple[TextChoice, dict[str, Any]]:
    """Return text and settings of the ``evaluate`` stage for the options of its verb."""
    # files that somebody names are all meant; of the standard library or a hub dataset a part is enough
    text = replace(text, eval_tokens=text.eval_tokens or ("all" if text.files else "32k"))
    named = [task for given in tasks for task in given.split(",") if task]
    return text, {"max_perplexity_increase": gate, "round_teacher": False, "tasks": named or None}


def read_verb(
    kind: str,
    model: str,
    settings: dict[str, Any],
    text: TextChoice,
    teacher: str | None,
    overrides: "Sequence[Override]",
    tell: "Tell | None" = None,
) -> "Recipe":
    """Return the recipe of one stage on a model: that of the verb, and of the function of the same name.

    Raises:
        UserError: a stage ``distill`` has no teacher, or the recipe is wrong.
    """
    # told here, where the option has a name; the recipe would speak of its key
    if kind == "distill" and not teacher:
        raise UserError("decoct distill needs a teacher to learn from: --teacher MODEL (a model folder or a hub id)")
    from ...configs.loader import recipe_from_dict

    given = verb_overrides(kind, overrides)
    # only where the user gives no length: a stage takes tokens or steps
    if "tokens" in settings and settings["tokens"] is None and kind in DEFAULT_TOKENS and not any(map(_gives_steps, given)):
        settings = {**settings, "tokens": DEFAULT_TOKENS[kind]}
    plain = verb_recipe(kind, model, settings, text, teacher, given)
    # read once to learn tokens, length of windows and devices, which options, overrides and defaults decide together
    plain["trainer"] = {"global_batch_tokens": _step_tokens(recipe_from_dict(plain, given))}
    return recipe_from_dict(plain, given, tell=tell)


def _step_tokens(recipe: "Recipe") -> int:
    """Return the tokens per optimizer step of a verb; an override of the user's goes before it."""
    from ...trainer.plan import MOST_WINDOWS, default_step_windows
    from ..run.processes import wanted_processes

    settings, length = recipe.stages[0].settings, recipe.data.seq_length
    tokens = getattr(settings, "tokens", None)
    if (structured := getattr(settings, "structured", None)) is not None and structured.budget is not None:
        # the shapes of a search are trained for a short time
        tokens = structured.found_by.tokens
    # who gives steps decides their number, so that they need not be small; a stage that trains nothing has none
    if tokens is None:
        return length * MOST_WINDOWS
    return length * default_step_windows(tokens, length, wanted_processes(recipe.trainer.devices))


def export_model(model: Path, out: Path, form: str, allow_inexact: bool = False, reader_version: str | None = None) -> "ExportResult":
    """Pack a model folder, or a GGUF file, and verify the result."""
    from ...models.folder.gguf_place import gguf_file
    from ...models.folder.loading import find_model_folder
    from ...qat.export.export import export_folder

    # a GGUF file becomes a plain folder first
    if gguf_file(model) is not None:
        model = find_model_folder(model, None, weights=True)
    return export_folder(model, out, form, allow_inexact=allow_inexact, reader_version=reader_version)
