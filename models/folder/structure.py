"""Weights that a model folder must hold according to its config: names, shapes and linears, without allocating memory."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..capabilities import decoder_weights
from ..common.json_file import read_json
from .config_checks import check_depth
from .loading import load_config, meta_model
from .stored_names import module_names, stored_names, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The weights of one config, under their names in files, which differ from the module names in a few families."""

    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter and stored buffer; tied ones appear under each name."""
    tied: frozenset[str]
    """Names that repeat the tensor of another name and need not be stored (``lm_head.weight`` of a tied model)."""
    linears: tuple[str, ...]
    """Every ``nn.Linear``, the head included, in module order."""
    embedding: str = ""
    """Name of the input embedding's module."""
    head: str = ""
    """Name of the output head's module."""
    modules: dict[str, str] = field(default_factory=dict)
    """Name of a module in files -> its name in the model, where they differ (``embed_out`` -> ``lm_head`` in GPT-NeoX)."""
    model: "PreTrainedModel | None" = field(default=None, repr=False, compare=False)
    """The model on the meta device."""

    def stored_modules(self) -> dict[str, str]:
        """Name of a module in the model -> its name in files, where they differ."""
        return {module: stored for stored, module in self.modules.items()}

    def in_files(self, names: Iterable[str]) -> dict[str, str]:
        """Names of tensors in some folder -> the names that transformers writes; unknown names stay unchanged."""
        names = list(names)
        # the common case needs no conversion
        if self.model is None or all(name in self.shapes for name in names):
            return {name: name for name in names}
        # through the module names: file name -> module -> name that transformers writes
        written = stored_names(self.model)
        inside = module_names(self.model, names)
        return {name: name if name in self.shapes else written.get(inside[name] or name, name) for name in names}

    @property
    def parameters(self) -> int:
        """Number of elements; tied weights count once."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if name not in self.tied)

    def differences(self, found: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Sentences about missing, unexpected or differently shaped tensors in ``found``; [] when it is exactly this model."""
        problems = [f"{name} is missing" for name in self.shapes if name not in found and name not in self.tied]
        problems += [f"{name} is unexpected: config.json has no such weight" for name in found if name not in self.shapes]
        problems += [
            f"{name} has shape {tuple(shape)}, but config.json asks for {self.shapes[name]}"
            for name, shape in found.items()
            if name in self.shapes and tuple(shape) != self.shapes[name]
        ]
        return problems


def model_structure(folder: Path, found: Mapping[str, tuple[int, ...]] | None = None) -> Structure:
    """The structure that ``config.json`` of a model folder describes, packed or not.

    Args:
        folder: Folder with a config.json.
        found: Shapes of the tensors in its files, if known. A config with more layers than tensors is refused before it is built.

    Raises:
        UserError: the config is missing, damaged or of an unknown model type.
    """
    if found is not None:
        # before the model is built, layer by layer
        check_depth(read_json(folder / "config.json"), len(found), folder / "config.json")
    model = meta_model(plain_config(folder))
    first: dict[int, str] = {}
    tied = set()
    names = stored_names(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # the first name counts as the stored one, every further name as tied to it
        if first.setdefault(id(parameter), name) != name:
            tied.add(names.get(name, name))
    # modules are renamed together with their weight
    stored = {name: names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight") for name, _ in model.named_modules()}

    def name_of(module: object) -> str:
        return next((stored[name] for name, other in model.named_modules() if other is module), "")

    return Structure(
        shapes={name: tuple(tensor.shape) for name, tensor in stored_tensors(model).items()},
        tied=frozenset(tied),
        linears=tuple(stored[name] for name, module in model.named_modules() if isinstance(module, nn.Linear)),
        embedding=name_of(model.get_input_embeddings()),
        head=name_of(model.get_output_embeddings()),
        modules={stored[name]: name for name in stored if stored[name] != name},
        model=model,
    )


def covered_share(folder: Path, modules: Iterable[str]) -> float:
    """Share of the decoder's weights of a model folder, packed or not, that these linears (module names) hold."""
    return decoder_weights(meta_model(plain_config(folder))).share(modules)


def plain_config(folder: Path) -> "PreTrainedConfig":
    """The config of a model folder without its quantization, as for the unpacked model."""
    config = load_config(folder)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    return config
