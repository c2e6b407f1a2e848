"""The stage key: one hash of all that a stage's numbers depend on. A finished stage with the same key is skipped, else it runs again.

Devices, strategy, paths, data loader workers, checkpoint interval and loggers are not part of it, because they change no numbers.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...losses.settings_own import OwnLossSettings
from ...models.common.files import sha256_file, sha256_json
from ...parts import Part
from ...trainer.plan import WARMUP
from ...trainer.settings import TrainerSettings
from ...trainer.settings_own import OwnSettings

# Settings of a stage that do not change what it computes: how often it saves, where weights are kept, and what the user accepts.
_NOT_NUMBERS = {"checkpoint_every", "stream", "allow_partial"}
# Keys of stages that are not in the stage key where they are not given.
_LATER = ("wanda", "sparsegpt", "movement", "pattern", "transform", "importance", "mix", "local")
_TRAINER_NUMBERS = ("precision", "global_batch_tokens", "gradient_clip", "save_dtype", "optimizer")


def stage_key(
    *,
    name: str,
    kind: str,
    settings: Any,
    format_version: int,
    input_hash: str,
    data: str,
    teacher: str | None,
    trainer: TrainerSettings,
    seed: int,
    sparse: Sequence[str] = (),
) -> str:
    """sha256 (hex) over the stage's settings and everything upstream that changes its numbers.

    Args:
        name: name of the stage, from which the order of its data is drawn.
        kind: stage kind; settings: its dataclass; format_version: version of the stage's own output.
        input_hash: content hash of the input model folder; data: fingerprint of the prepared data.
        teacher: content hash and dtype of the teacher, None without one.
        trainer: precision, global batch, clipping and save dtype are taken from it.
        seed: the recipe's seed.
        sparse: matrices whose zeros the stage keeps; the bytes of the input do not show which these are.
    """
    chosen = {key: value for key, value in asdict(settings).items() if key not in _NOT_NUMBERS}
    if not chosen.get("callbacks", True):
        # stages without callbacks keep the keys of versions that had none
        del chosen["callbacks"]
    if chosen.get("structured"):
        # what is not asked for is left out, so that stages of versions that cut the FFN alone keep their keys
        chosen["structured"] = {axis: value for axis, value in chosen["structured"].items() if value not in (None, False)}
    if "warmup" in chosen and chosen["warmup"] is None:
        # the default's earlier name: keys must not change, so that finished stages stay finished
        chosen["warmup"] = WARMUP
    # methods and keys that came later: stages without them keep the keys of versions that had none
    for section in (chosen, chosen.get("magnitude") or {}):
        for later in [name for name in _LATER if section.get(name, "") is None]:
            del section[later]
    if isinstance(chosen.get("loss"), dict) and chosen["loss"].get("features", True) is None:
        # a loss on predictions alone keeps the keys of versions that had no other
        chosen["loss"] = {name: value for name, value in chosen["loss"].items() if name != "features"}
    if chosen.get("samples", True) is None:
        # stages without samples keep the keys of versions that had none
        del chosen["samples"]
    elif "samples" in chosen and isinstance(chosen["samples"], dict):
        # how many are drawn at a time changes memory and rounding alone
        del chosen["samples"]["batch"]
    changes = [chosen.get("weights"), chosen.get("embedding"), chosen.get("head"), *(chosen.get("overrides") or {}).values()]
    for section in changes:
        # so do specs of versions without ternary codes
        if isinstance(section, dict) and not section.get("ternary", True):
            del section["ternary"]
    if chosen.get("importance"):
        # the file's content decides, and not where it lies
        chosen["importance"] = sha256_file(Path(chosen["importance"]))
    watched = _watched(chosen, trainer)
    return sha256_json(
        {
            "name": name,
            "kind": kind,
            "settings": chosen,
            "format": format_version,
            "input": input_hash,
            "data": data,
            "teacher": teacher,
            "trainer": {name: getattr(trainer, name) for name in _TRAINER_NUMBERS},
            "seed": seed,
            **watched,
            # only where there are any, so that the keys of dense models stay those of earlier versions
            **({"sparse": list(sparse)} if sparse else {}),
            # a changed file runs the stages again that use a part of it
            **({"parts": [part.key() for part in used]} if (used := parts_of(settings)) else {}),
        }
    )


def parts_of(settings: Any) -> list[Part]:
    """The imported parts that a stage uses: itself, its divergence, its callbacks. A data source is in the fingerprint of the text."""
    sections = (settings, getattr(settings, "loss", None), *getattr(settings, "callbacks", ()))
    return [section.part for section in sections if isinstance(section, OwnSettings | OwnLossSettings)]


def _watched(chosen: dict[str, Any], trainer: TrainerSettings) -> dict[str, Any]:
    """Remove ``result`` and ``early_stopping`` from ``chosen`` where they are at their defaults, so that the keys of finished stages stay;
    else return when the stage is evaluated, which then decides what it ends with."""
    if chosen.get("result", "last") == "last":
        chosen.pop("result", None)
    if chosen.get("early_stopping") is None:
        chosen.pop("early_stopping", None)
    return {"evaluate_every": trainer.evaluate_every} if {"result", "early_stopping"} & chosen.keys() else {}
