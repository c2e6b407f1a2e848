"""Checks of the widths that a recipe is known to have: channels and layers that pruning keeps, and group sizes."""

from pathlib import Path
from typing import Any

from ..models.common.terminal_text import counted
from ..models.settings import allowed_layers
from ..models.sizes import WORDS
from ..qat.spec import USUAL_GROUPS
from ..trainer.settings_pruning import PruneSettings
from ..trainer.settings_quantization import QatSettings, QuantizeSettings
from .architectures import HUB_IDS, architecture
from .draft import Draft, key_path
from .problems import Problems
from .recipe import StageEntry


def known_numbers(draft: Draft) -> dict[str, int]:
    """Return depth and widths of the model that the student starts from, as far as they are known without opening a model."""
    # a student that is wrong has no widths, and its own problem is reported already
    if draft.student is None:
        return {}
    # a student given by path is not opened here; the plan does that
    config: dict[str, Any] = draft.student.config or {}
    if draft.student.keep and draft.teacher:
        if draft.teacher.scratch:
            scratch = draft.teacher.scratch
            return {
                "layers": scratch.layers,
                "hidden": scratch.hidden,
                "ffn": scratch.ffn,
                "heads": scratch.heads,
                "kv_heads": scratch.kv_heads,
            }
        # a local folder of the same name wins, and its config is not read here
        path = draft.teacher.path or ""
        config = architecture(path) if path in HUB_IDS and not Path(path).exists() else {}
    named = {
        "layers": config.get("num_hidden_layers"),
        "hidden": config.get("hidden_size"),
        "ffn": config.get("intermediate_size"),
        "heads": config.get("num_attention_heads"),
        "kv_heads": config.get("num_key_value_heads"),
    }
    # whatever the config holds there, only whole numbers are judged; their types are checked when the config is built
    return {name: number for name, number in named.items() if type(number) is int and number > 0}


def check_kept(draft: Draft, problems: Problems) -> None:
    """Check that the teacher has the layers that the student is made of, where its depth is known."""
    layers, depth = draft.student.keep.layers if draft.student and draft.student.keep else None, known_numbers(draft).get("layers")
    if layers is None or depth is None:
        return
    at = ("student", "keep", "layers")
    if not isinstance(layers, int):
        if layers[-1] >= depth:
            problems.add(at, f"layer {layers[-1]} does not exist in a teacher of {counted(depth, 'layer')}; they are 0 to {depth - 1}")
    # at least two layers stay, because the first and the last one are always kept; a model of one layer keeps that one
    elif not min(2, depth) <= layers <= depth:
        problems.add(at, f"{counted(layers, 'layer')} cannot be kept of a teacher that has {depth}; {allowed_layers(depth)}")


def check_widths(draft: Draft, problems: Problems) -> None:
    """Check that pruning keeps no more than there is, and that group sizes divide the widths at their stage."""
    widths = known_numbers(draft)
    if draft.student and draft.student.keep and "layers" in widths:
        widths["layers"] = min(widths["layers"], draft.student.keep.depth)
    for entry in draft.stages:
        settings = entry.settings if entry else None
        if entry and isinstance(settings, PruneSettings) and settings.structured:
            if settings.structured.budget is not None:
                # the search decides; the plan knows what it may find
                widths.clear()
            for name, kept in settings.structured.kept.items():
                # widths that are not known allow everything; the plan, which opens the model, checks again
                if kept > widths.get(name, kept):
                    has = f"keeps {kept} {WORDS[name]} of a student that has {widths[name]} here"
                    problems.add(key_path(entry, "structured", name), has)
                # later stages meet the narrower model
                elif name in widths:
                    widths[name] = kept
                if name == "kv_heads" and "heads" not in settings.structured.kept:
                    # fewer groups have fewer query heads; how many, the plan knows
                    widths.pop("heads", None)
        # skipped and overridden modules may be the very ones that do not fit; the plan, which knows the model, checks these recipes
        if entry and isinstance(settings, QatSettings | QuantizeSettings) and not (settings.skip or settings.overrides or settings.mix):
            _check_group(entry, settings.weights.group_size, widths, problems)


def _check_group(entry: StageEntry, group: int | str, widths: dict[str, int], problems: Problems) -> None:
    """Check that a group size divides every width; one message names all widths that it does not divide."""
    if isinstance(group, str):
        # 'channel' and 'tensor' fit every width
        return
    words = {"hidden": "hidden size", "ffn": "FFN channels"}
    widths = {name: width for name, width in widths.items() if name in words}
    # with one group size for all, each width must be a multiple of it
    broken = [f"{words[name]} ({width:,})" for name, width in widths.items() if width % group]
    if not broken:
        return
    fits = [size for size in USUAL_GROUPS if all(width % size == 0 for width in widths.values())]
    hint = f"use {' or '.join(map(str, fits))}" if fits else "use channel"
    message = f"{group} does not divide the student's {' and '.join(broken)} at this stage; {hint}, or skip these modules"
    problems.add(key_path(entry, "weights", "group_size"), message)
