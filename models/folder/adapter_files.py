"""A LoRA adapter of peft as data: its settings and matrices, read without peft and checked against the model that it changes.

Settings that would make the merged model another one than the adapter computes are refused by name, known ones and those of later
versions of peft alike.

Source: peft ``tuners/lora/config.py``, ``utils/save_and_load.py`` (names in files), ``utils/other.py`` (get_pattern_key).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import UserError
from ..common.json_file import read_json
from .refused_inputs import ADAPTER
from .safetensors_read import read_header

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HARMLESS = frozenset(
    (
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
        "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
        "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "use_dora",
        "lora_bias", "qalora_group_size", "runtime_config", "eva_config", "ensure_weight_tying",
    )
)  # fmt: skip
"""Settings that are read here, or that decide only how an adapter is trained."""
_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Ways to start an adapter that take its first value out of the base model's weights."""
_PARTS = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_embedding_A": "a", ".lora_embedding_B": "b", ".lora_B.bias": "b_bias",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip


@dataclass
class Change:
    """What an adapter does to one module: a sum of two matrices, or whole parameters in place of the base's."""

    module: str
    """Name in the model."""
    parts: dict[str, str] = field(default_factory=dict)
    """a, b, b_bias, magnitude -> name in the adapter's file."""
    whole: dict[str, str] = field(default_factory=dict)
    """weight, bias -> name in the adapter's file of what replaces it."""
    embedding: bool = False


class Adapter:
    """An opened adapter."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if the folder holds no LoRA adapter that can be merged."""
        self.folder = Path(folder)
        if not (self.folder / ADAPTER).is_file():
            raise UserError(f"{self.folder} is no adapter of peft: it has no {ADAPTER}; give the folder that save_pretrained wrote")
        self.settings = read_json(self.folder / ADAPTER)
        self._check_settings()
        self.file = self.folder / WEIGHTS
        if not self.file.is_file():
            pickled = (self.folder / "adapter_model.bin").is_file()
            why = "its weights only as adapter_model.bin, which is pickled and not read" if pickled else f"no {WEIGHTS}"
            raise UserError(f"{self.folder} has {why}; save the adapter again (save_pretrained of peft writes {WEIGHTS})")
        # header only: a tensor is read when it is merged
        self.shapes: Mapping[str, tuple[int, ...]] = {name: info.shape for name, info in read_header(self.file).tensors.items()}
        self.changes = self._changes()

    @property
    def base(self) -> str | None:
        """The model that the adapter says it belongs to."""
        named = self.settings.get("base_model_name_or_path")
        return named if isinstance(named, str) and named else None

    @property
    def uses_magnitudes(self) -> bool:
        """Whether it is DoRA: a direction with a magnitude per row."""
        return bool(self.settings.get("use_dora"))

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, of a module; both numbers may depend on its name."""
        rank, alpha = self.rank(module), self._number("alpha_pattern", "lora_alpha", module)
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def rank(self, module: str) -> int:
        """The rank that the settings name for a module."""
        return int(self._number("rank_pattern", "r", module))

    def tensor(self, name: str) -> "Tensor":
        """A tensor of the adapter in fp32; UserError if it is not finite."""
        import torch

        from .weights import read_tensor

        values = read_tensor(self.file, name).to(torch.float32)
        if not bool(values.isfinite().all()):
            raise UserError(f"{self.file}: {name} holds NaN or infinite numbers; the adapter is damaged or its training diverged")
        return values

    def _number(self, patterns: str, key: str, module: str) -> float:
        given = self.settings.get(patterns) or {}
        try:
            # peft's own rule: the pattern matches the end of a module's name
            found = next((value for pattern, value in given.items() if re.match(rf"(.*\.)?({pattern})$", module)), self.settings.get(key))
        except re.error as error:
            raise self._refusal(f"{patterns} holds the pattern {error.pattern!r:.100}, which is no regular expression") from error
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found) or (key == "r" and found < 1):
            raise self._refusal(f"{key} is {found!r:.100}, not a number")
        return float(found)

    def _refusal(self, why: str) -> UserError:
        return UserError(f"{self.folder / ADAPTER}: {why}, so the adapter cannot be merged")

    def _check_settings(self) -> None:
        given = self.settings
        if given.get("peft_type") != "LORA":
            raise self._refusal(
                f"peft_type is {given.get('peft_type')!r:.100}; only LORA adapters (DoRA and rsLoRA too) are sums of matrices"
            )
        # a setting of a later version that is off changes nothing
        unknown = [name for name, value in given.items() if name not in _HARMLESS and value not in (None, False, {}, [], "")]
        if unknown:
            raise self._refusal(f"{unknown[0]}={given[unknown[0]]!r:.100} is not known here, and may change what the adapter computes")
        start = given.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
            raise self._refusal(
                f"init_lora_weights is {start!r}, which changes the base model's weights before training; save the adapter as plain LoRA "
                "first (path_initial_model_for_weight_conversion of peft's save_pretrained)"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(given.get(name) or {}, dict):
                raise self._refusal(f"{name} is {given[name]!r:.100}, not a mapping of names")

    def _changes(self) -> list[Change]:
        found: dict[str, Change] = {}
        for name in self.shapes:
            if not name.startswith(_PREFIX):
                raise UserError(f"{self.file}: {name!r:.200} does not begin with {_PREFIX!r}; the file is no adapter of peft")
            inner = name.removeprefix(_PREFIX)
            suffix = next((one for one in _PARTS if inner.endswith(one)), None)
            module, _, part = (inner.removesuffix(suffix), "", "") if suffix else inner.rpartition(".")
            # peft's name for the base's own parameters inside a module with an adapter
            module = module.removesuffix(".base_layer")
            change = found.setdefault(module, Change(module))
            if suffix:
                change.parts[_PARTS[suffix]] = name
                change.embedding |= "lora_embedding" in suffix
            elif part in ("weight", "bias"):
                change.whole[part] = name
            else:
                raise UserError(f"{self.file}: {name!r:.200} is no part of a LoRA adapter that can be merged")
        if not found:
            raise UserError(f"{self.file} is empty; save the adapter again")
        for change in found.values():
            # both matrices or neither
            lone = [part for part in ("a", "b") if (part in change.parts) != bool(change.parts)]
            if lone:
                raise UserError(f"{self.file}: {change.module} has no lora_{lone[0].upper()}; the file is incomplete")
        return list(found.values())
