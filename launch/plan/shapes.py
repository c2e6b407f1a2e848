"""The shape of every model that a recipe passes through, on the meta device: no weight is read or downloaded."""

import copy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...models.common.errors import UserError
from ...models.common.light_configs import import_configs_alone
from ...qat.scheme import example_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ...configs.recipe import Recipe, StageEntry
    from ...models.capabilities import Capabilities
    from ...models.dimensions import Dimensions
    from ...qat.scheme import QuantScheme
    from ...qat.spec import ActivationSpec, QuantSpec
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
        return name.removeprefix(self.inside).split(".", 1)[1] if self.within(name) else name

    def describe(self) -> str:
        """'llama, 24 layers, hidden 2,048, ffn 8,192, vocabulary 49,152'."""
        width = f", ffn {self.dimensions.ffn:,}" if self.linears else ""
        return f"{self.family.model_type}, {self.layers} layers, hidden {self.hidden:,}{width}, vocabulary {self.vocabulary:,}"


@dataclass(frozen=True)
class StageShape:
    """Shapes of a stage's input and output."""

    entry: "StageEntry"
    before: ModelShape
    after: ModelShape
    scheme: "QuantScheme | None"
    """Quantization scheme of the weights after the stage; None if they are not quantized."""
    activations: "ActivationSpec | None" = None
    """How the inputs of the quantized linears are rounded after the stage."""
    kv_cache: "ActivationSpec | None" = None
    """How keys and values are rounded after the stage."""


class ImpossibleStageError(UserError):
    """A stage asks for something that no model of its shape has; raised before anything runs."""


class Quantized(NamedTuple):
    """A matrix that is quantized."""

    rows: int
    columns: int
    spec: "QuantSpec"

    @property
    def scales(self) -> int:
        """Return the number of its scales."""
        rows, groups = self.spec.scale_shape(self.rows, self.columns)
        return rows * groups


def shape_of(config: "PreTrainedConfig", source: str) -> ModelShape:
    """Return the shape of the model of a transformers config."""
    from ...models.capabilities import capabilities
    from ...models.dimensions import dimensions
    from ...models.families import decoder_layers, decoder_linears, layers_prefix
    from ...models.outline import outline_of
    from ...qat.layers.targets import is_tied

    model = outline_of(config)
    names = {id(module): name for name, module in model.named_modules()}
    layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
    return ModelShape(
        config=config,
        source=source,
        tensors={name: tuple(p.shape) for name, p in model.named_parameters()},
        linears={name: (linear.out_features, linear.in_features) for name, linear in decoder_linears(model).items()},
        layer=max(layers, default=0),
        inside=layers_prefix(model),
        dimensions=dimensions(model),
        family=capabilities(model),
        embedding=names.get(id(model.get_input_embeddings()), ""),
        head="" if is_tied(model) else names.get(id(model.get_output_embeddings()), ""),
    )


def config_of(path: str, revision: str | None = None) -> tuple["PreTrainedConfig", str]:
    """Return (config, its origin) of a model folder, hub id or stored architecture; stored architectures need no network.

    Raises: UserError when none of them is there.
    """
    from ...configs.architectures import HUB_IDS, architecture, names
    from ...models.folder.loading import load_config

    import_configs_alone()
    if Path(path).is_dir():
        return load_config(path), f"config.json in {path}"
    if path in HUB_IDS or path in names():
        return config_from(architecture(path)), f"stored architecture of {path}"
    return load_config(path, revision=revision), f"config.json of {path}"


def config_from(fields: dict[str, Any]) -> "PreTrainedConfig":
    """Return the transformers config of plain fields, including ``model_type``."""
    import_configs_alone()
    from transformers import AutoConfig

    from ...models.folder.config_checks import check_numbers

    check_numbers(fields, "student.config")
    return AutoConfig.for_model(**fields)


def teacher_shape(recipe: "Recipe") -> ModelShape | None:
    """Return the shape of the recipe's teacher; for a scratch teacher with the requested vocabulary."""
    if recipe.teacher is None:
        return None
    if scratch := recipe.teacher.scratch:
        from ...trainer.scratch import scratch_config

        import_configs_alone()
        return shape_of(scratch_config(scratch, scratch.vocab, recipe.data.seq_length), "teacher.scratch")
    assert recipe.teacher.path is not None
    return shape_of(*config_of(recipe.teacher.path, recipe.teacher.revision))


def student_shape(recipe: "Recipe", teacher: ModelShape | None) -> ModelShape:
    """Return the student's shape before the first stage; its vocabulary is the teacher's until the tokenizer is read."""
    from ...models.student import kept_config

    settings = recipe.student
    if settings.path:
        return shape_of(*config_of(settings.path, settings.revision))
    if settings.keep:
        if teacher is None:
            raise UserError("student.keep needs a teacher to cut the student from; add one, or use student.path")
        if reason := teacher.family.refusal("keep layers"):
            raise ImpossibleStageError(f"student.keep: {reason}; use student.path or student.config (docs/families.md)")
        config, _ = kept_config(teacher.config, settings.keep.layers)
        return shape_of(config, f"{settings.keep.layers} of the teacher's {teacher.layers} layers")
    fields = dict(settings.config or {})
    if teacher is not None:
        fields.setdefault("vocab_size", teacher.vocabulary)
    return shape_of(config_from(fields), "student.config")


def stage_shapes(recipe: "Recipe", student: ModelShape) -> list[StageShape]:
    """Return the shapes of every stage, in order."""
    from ...trainer.settings import PruneSettings
    from ...trainer.settings_quantization import QatSettings, QuantizeSettings

    found: list[StageShape] = []
    shape, scheme, beside = student, None, {}
    for entry in recipe.stages:
        before, settings = shape, entry.settings
        if isinstance(settings, PruneSettings) and settings.structured:
            shape = _with_ffn(shape, settings.structured.ffn, entry.name)
        if isinstance(settings, QatSettings | QuantizeSettings):
            scheme = settings.scheme
            beside = {"activations": settings.activations, "kv_cache": settings.kv_cache}
            _check_scheme(shape, scheme, entry)
            _check_calibration(shape, scheme, entry, recipe.data.seq_length)
        elif entry.kind in ("pretrain", "distill", "prune"):
            # training and pruning write plain weights: an earlier quantization is gone
            scheme, beside = None, {}
        found.append(StageShape(entry, before, shape, scheme, **beside))
    return found


def quantized_linears(shape: ModelShape, scheme: "QuantScheme") -> dict[str, Quantized]:
    """Return the quantized matrices: linears of the decoder layers, and embedding and head if requested.

    Raises:
        ValueError: a pattern changes nothing, or two change one module differently.
    """
    specs = scheme.of_linears(shape.linears)
    found = {name: Quantized(*shape.linears[name], spec) for name, spec in specs.items()}
    for change, name in ((scheme.embedding, shape.embedding), (scheme.head, shape.head)):
        if change is not None and name:
            rows, columns = shape.tensors[f"{name}.weight"]
            found[name] = Quantized(rows, columns, change.applied(scheme.weights))
    return found


def _check_calibration(shape: ModelShape, scheme: "QuantScheme", entry: "StageEntry", seq_length: int) -> None:
    """Raise ImpossibleStageError if GPTQ gets fewer tokens, in whole windows, than the widest matrix has inputs."""
    given, method = entry.settings.calibration_tokens, getattr(entry.settings, "method", "gptq")
    if given is None or method != "gptq":
        return
    widest = max((one.columns for name, one in quantized_linears(shape, scheme).items() if name in shape.linears), default=0)
    tokens = -(-given // seq_length) * seq_length
    if tokens < widest:
        raise ImpossibleStageError(
            f"stages.{entry.index}.{entry.kind}.calibration_tokens: {tokens:,} tokens are too few for a matrix with {widest:,} inputs; "
            "GPTQ needs at least as many, and many times that are usual"
        )


def _check_scheme(shape: ModelShape, scheme: "QuantScheme", entry: "StageEntry") -> None:
    """Raise ImpossibleStageError if a pattern matches nothing, or a group size does not divide; names the widths that would."""
    place = f"stages.{entry.index}.{entry.kind}"
    try:
        quantized = quantized_linears(shape, scheme)
    except ValueError as error:
        raise ImpossibleStageError(f"{place}.{error}") from error
    leaves = [*shape.linears, shape.embedding, shape.head]
    for pattern in scheme.skip:
        if not any(fnmatchcase(name, pattern) for name in leaves):
            raise ImpossibleStageError(f"{place}.skip: {pattern!r} matches no linear layer of the model; {example_of(shape.linears)}")
    if not quantized:
        raise ImpossibleStageError(f"{place}: there is nothing to quantize: skip={list(scheme.skip)} leaves no linear layer")
    if scheme.head and not shape.head:
        raise ImpossibleStageError(
            f"{place}.head: the head is tied to the embedding, whose table it multiplies by; use 'embedding', which then applies to both"
        )
    for name, (_, columns, spec) in quantized.items():
        try:
            spec.group_width(columns)
        except ValueError as error:
            raise ImpossibleStageError(f"{place}.weights.group_size: module {name}: {error}") from error


def _with_ffn(shape: ModelShape, ffn: int, stage: str) -> ModelShape:
    from ...models.families import family_of

    family = family_of(shape.config)
    width = getattr(shape.config, family.ffn_field)
    if ffn > width:
        raise UserError(f"{stage}: structured.ffn={ffn} keeps more FFN channels than the student's {width}; give at most {width}")
    if ffn == width:
        raise ImpossibleStageError(f"{stage}: structured.ffn={ffn} keeps all FFN channels, so that nothing is pruned; give fewer")
    config = copy.deepcopy(shape.config)
    setattr(config, family.ffn_field, ffn)
    return shape_of(config, f"{shape.source}, ffn {ffn:,} of {width:,}")


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
