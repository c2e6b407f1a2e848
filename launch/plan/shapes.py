"""The shape of one model, on the meta device: no weight is read or downloaded."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.common.errors import UserError
from ...models.common.light_configs import import_configs_alone

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ...models.capabilities import Capabilities
    from ...models.dimensions import Dimensions
    from ...trainer.processes.teacher_memory import TeacherSize


@dataclass(frozen=True)
class ModelShape:
    """Numbers of one architecture. Elements, not bytes; tied tensors once."""

    config: "PreTrainedConfig" = field(repr=False)
    source: str
    """Where the numbers come from."""
    tensors: dict[str, tuple[int, ...]] = field(repr=False)
    """Shape of every parameter."""
    linears: dict[str, tuple[int, int]] = field(repr=False)
    """(out, in) of every linear of the decoder layers."""
    layer: int
    """Parameters of one decoder layer (the largest)."""
    inside: str
    """Common prefix of the names of the decoder layers' tensors."""
    dimensions: "Dimensions" = field(repr=False)
    family: "Capabilities" = field(repr=False)
    """What can be done with the model."""
    embedding: str = ""
    """Name of the input embedding's module."""
    head: str = ""
    """Name of the output head's module; '' when it is tied to the embedding."""

    @property
    def parameters(self) -> int:
        """Return the number of all parameters."""
        return sum(_elements(shape) for shape in self.tensors.values())

    @property
    def linear(self) -> int:
        """Return the number of weights in the decoder's linears."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def layers(self) -> int:
        """Return the number of decoder layers."""
        return self.dimensions.layers

    @property
    def hidden(self) -> int:
        """Return the hidden size."""
        return self.dimensions.hidden

    @property
    def vocabulary(self) -> int:
        """Return the number of rows of the head."""
        return self.dimensions.vocabulary

    @property
    def head_width(self) -> int:
        """Return the number of channels that the output head reads; of some families it is not the hidden size."""
        return self.tensors.get(f"{self.head or self.embedding}.weight", (0, self.hidden))[1]

    @property
    def outside(self) -> int:
        """Return the number of parameters outside the decoder layers: embedding, final norm, head."""
        return sum(_elements(shape) for name, shape in self.tensors.items() if not self.within(name))

    @property
    def as_teacher(self) -> "TeacherSize":
        """Return the sizes that determine the model's memory as a teacher."""
        from ...trainer.processes.teacher_memory import TeacherSize

        rows = sum(rows for rows, _ in self.linears.values())
        return TeacherSize(parameters=self.parameters, outside=self.outside, layer=self.layer, linear=self.linear, linear_rows=rows)

    def within(self, name: str) -> bool:
        """Return whether a tensor is in the decoder layers."""
        return bool(self.inside) and name.startswith(self.inside)

    def kind_of(self, name: str) -> str:
        """Return a module's name within its decoder layer: 'mlp.down_proj' for 'model.layers.3.mlp.down_proj'."""
        # without the prefix and the layer's number
        return name.removeprefix(self.inside).split(".", 1)[1] if self.within(name) else name

    def describe(self) -> str:
        """'llama, 24 layers, hidden 2,048, ffn 8,192, vocabulary 49,152'."""
        width = f", ffn {self.dimensions.ffn:,}" if self.linears else ""
        return f"{self.family.model_type}, {self.layers} layers, hidden {self.hidden:,}{width}, vocabulary {self.vocabulary:,}"


def shape_of(config: "PreTrainedConfig", source: str) -> ModelShape:
    """Return the shape of the model of a transformers config."""
    # here and not above: families that are not known by arithmetic are built, which imports torch
    from ...models.outline import outline_of

    outline = outline_of(config)
    return ModelShape(config=config, source=source, **{part.name: getattr(outline, part.name) for part in fields(outline)})


def config_of(path: str, revision: str | None = None) -> tuple["PreTrainedConfig", str]:
    """Return (config, its origin) of a model folder, hub id or stored architecture; stored architectures need no network.

    Raises: UserError when none of them is there.
    """
    from ...configs.architectures import HUB_IDS, architecture, names
    from ...models.folder.gguf_place import gguf_file
    from ...models.folder.loading import load_config

    if (file := gguf_file(path)) is not None:
        return load_config(path, light=True), f"the header of {file}"
    if Path(path).is_dir():
        return load_config(path, light=True), f"config.json in {path}"
    # before the hub is asked: a plan of a known model needs no network
    if path in HUB_IDS or path in names():
        return config_from(architecture(path)), f"stored architecture of {path}"
    return load_config(path, revision=revision, light=True), f"config.json of {path}"


def config_from(given: dict[str, Any]) -> "PreTrainedConfig":
    """Return the transformers config of plain fields, including ``model_type``.

    Raises: UserError if a size is impossible, or transformers refuses the model type or a value.
    """
    from ...models.folder.config_checks import check_numbers, refused_config, unknown_kind
    from ...models.known_config import known_config

    check_numbers(given, "student.config")
    # by arithmetic where the family is known, which needs no transformers
    config: Any = known_config(given)
    # transformers has to read it: its config classes without its modelling code
    if config is None:
        import_configs_alone()
        from huggingface_hub.errors import StrictDataclassError
        from transformers import CONFIG_MAPPING, AutoConfig

        # asked first: transformers' own message lists every model type
        if given.get("model_type") not in CONFIG_MAPPING:
            raise UserError(unknown_kind(given.get("model_type")))
        try:
            config = AutoConfig.for_model(**given)
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise UserError(refused_config(error)) from error
    return config


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
