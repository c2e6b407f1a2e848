"""Loads a model tensor by tensor, so that no weight is in memory twice.

``from_pretrained`` builds the whole model on the host and then moves it. Here the model is built on the meta device, and each weight goes
from the mapped file directly to its destination: a GPU, or the rows of one rank. Weights with different names in files and modules are
renamed as transformers does (``stored_names``). Families whose weights are fused or split (experts) use ``load_model``.
"""

import ctypes
import re
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..common.quiet import quiet_transformers
from .load_report import check_report
from .loading import check_finite, find_model_folder, load_config, load_model, meta_model
from .stored_names import ignored_patterns, module_names
from .weights import WeightFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def can_stream(path: str | Path, revision: str | None = None) -> bool:
    """Whether the files of a model folder or hub id hold exactly the weights of its modules, under the same or renamed names.

    Also False for a model that keeps some weights in fp32, has stored buffers, or has buffers that only full loading can compute.

    Raises:
        UserError: see ``load_config`` and ``check_model_folder``.
    """
    folder = find_model_folder(path, revision, weights=True)
    with WeightFiles(folder) as files:
        model = meta_model(load_config(folder))
        files.call(module_names(model, files.names()))
        return _fits(model, files)


def empty_model(path: str | Path, revision: str | None = None) -> "tuple[PreTrainedModel, WeightFiles]":
    """The model on the meta device in fp32 with real buffers on the CPU, in eval mode, and the files to fill it from.

    Requires ``can_stream``. A tied weight has several names in the model; ``stored_name`` returns the one in the files.

    Raises:
        UserError: as ``load_model``, except for weights that are not finite, which ``WeightFiles.read`` refuses.
    """
    folder = find_model_folder(path, revision, weights=True)
    files = WeightFiles(folder)
    try:
        model = _skeleton(folder, torch.float32)
        files.call(module_names(model, files.names()))
        _check(path, model, files)
        materialize_buffers(model, "cpu")
    # the files stay open for the caller, unless it never gets them
    except BaseException:
        files.close()
        raise
    return model, files


def streamed_model(
    path: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu", revision: str | None = None
) -> "PreTrainedModel":
    """``load_model`` without a copy of the model on the host: the same values, errors and eval mode.

    Falls back to ``load_model`` where ``can_stream`` is false.

    Raises:
        UserError: see ``load_model``.
    """
    with open_files(path, revision, dtype) as (model, files):
        if model is None or files is None:
            return load_model(path, dtype=dtype, revision=revision, device=device)
        fill(model, files, dtype=dtype, device=device)
        place(model, device)
    return model


@contextmanager
def open_files(path: str | Path, revision: str | None, dtype: torch.dtype) -> "Iterator[tuple[PreTrainedModel | None, WeightFiles | None]]":
    """The model on the meta device in ``dtype`` and eval mode, and the files to ``fill`` it from; (None, None) if it cannot be streamed.

    Raises:
        UserError: as ``load_model``, for all errors that show without reading values.
    """
    folder = find_model_folder(path, revision, weights=True)
    with WeightFiles(folder) as files:
        model = _skeleton(folder, dtype)
        files.call(module_names(model, files.names()))
        if _fits(model, files):
            _check(path, model, files)
            yield model, files
        else:
            yield None, None


def fill(model: nn.Module, files: WeightFiles, *, dtype: torch.dtype, device: torch.device | str, inside: nn.Module | None = None) -> None:
    """Read every parameter that is still on the meta device, one at a time, into memory of its own on ``device``.

    Args:
        model: Model whose names are those of ``files``.
        files: Files to read from.
        dtype: Dtype of the parameters.
        device: Device of the parameters.
        inside: Fill only the parameters of this submodule.

    Raises:
        UserError: a weight is not finite, in the files or in ``dtype``.
    """
    wanted = None if inside is None else {id(parameter) for parameter in inside.parameters()}
    for places in parameter_places(model):
        parameter = getattr(places[0][0], places[0][1])
        # a second call fills only what an earlier one left empty
        if parameter.is_meta and (wanted is None or id(parameter) in wanted):
            name = stored_name(places, files)
            stored = files.read(name)
            # copy: what was read is mapped memory, which would change with the file
            tensor = torch.empty(stored.shape, dtype=dtype, device=device).copy_(stored)
            # read() has checked the stored values; a cast can overflow to infinity
            if dtype != stored.dtype:
                check_finite(files.folder, name, tensor, dtype)
            register(places, tensor)
    trim_host()


def trim_host() -> None:
    """Return freed memory to the system. glibc otherwise keeps the gaps that large temporaries leave between live tensors."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def place(model: nn.Module, device: torch.device | str, *, skip: Set[int] = frozenset()) -> None:
    """Materialize buffers on ``device`` and move parameters there one at a time, except those whose ``id`` is in ``skip``."""
    materialize_buffers(model, device)
    for places in parameter_places(model):
        parameter = getattr(places[0][0], places[0][1])
        if id(parameter) not in skip:
            moved = parameter.detach().to(device)
            # ``to`` returns the tensor itself where it is on the device already ('cuda' is the current card)
            if moved.device != parameter.device:
                register(places, moved)


Place = tuple[nn.Module, str, str]
"""Place of a parameter in the model: (module, attribute, full name)."""


def parameter_places(model: nn.Module) -> list[list[Place]]:
    """Every parameter once, in module order, with all its places in the model: a tied parameter has several."""
    found: dict[int, list[Place]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            # remove_duplicate=False above: each place of a tied parameter must be replaced
            found.setdefault(id(parameter), []).append((module, key, f"{prefix}.{key}" if prefix else key))
    return list(found.values())


def stored_name(places: list[Place], files: WeightFiles) -> str:
    """Name of a parameter in the files."""
    # the first of its names that is in the files: a tied weight is stored once
    return next(name for _, _, name in places if name in files)


def register(places: list[Place], tensor: Tensor) -> None:
    """Set ``tensor`` as the parameter in all its places; it is trainable if the former one was."""
    before = getattr(places[0][0], places[0][1])
    # one object for all places: separate ones would untie the weights
    parameter = nn.Parameter(tensor, requires_grad=before.requires_grad)
    for module, key, _ in places:
        module.register_parameter(key, parameter)


def materialize_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Compute the buffers that are on the meta device: rotary frequencies, in fp32 on the CPU as ``from_pretrained`` does.

    Parameters stay unchanged. Other buffers only move to ``device``.

    Raises:
        UserError: a buffer is not determined by the config of a rotary embedding.
    """
    for prefix, module in model.named_modules():
        empty = [key for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        # only rotary frequencies can be rebuilt from the config alone
        if empty and not _is_rotary(module):
            raise UserError(f"{type(model).__name__} computes the buffer {prefix}.{empty[0]} only while it is loaded whole; use load_model")
        if empty:
            fresh = _computed_buffers(module)
            # assigned directly: register_buffer would make a buffer persistent that is not
            for key in empty:
                module._buffers[key] = fresh[key]
        for key, buffer in list(module.named_buffers(recurse=False)):
            # not through .to(), which would move parameters too
            module._buffers[key] = buffer.to(device)


def _computed_buffers(rotary: nn.Module) -> dict[str, Tensor]:
    build: Any = type(rotary)
    # as from_pretrained does: frequencies computed on a GPU may differ in the last bit
    with torch.device("cpu"):
        return dict(build(config=rotary.config).named_buffers(recurse=False))


def _is_rotary(module: nn.Module) -> bool:
    names = {key for key, _ in module.named_buffers(recurse=False)}
    # scaled frequencies keep the original ones beside them
    return "RotaryEmbedding" in type(module).__name__ and hasattr(module, "config") and names <= {"inv_freq", "original_inv_freq"}


def _skeleton(folder: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """The model on the meta device in ``dtype`` and eval mode, with the config that ``from_pretrained`` would leave."""
    config = load_config(folder)
    # from_pretrained records the requested dtype in the config, and saving writes it
    config.dtype = dtype
    model: Any = meta_model(config)
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        try:
            with quiet_transformers():
                model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise UserError(f"{folder / 'generation_config.json'} cannot be read: {error}; mend or remove it") from error
    # also parameters that the config builds in another dtype
    return model.to(dtype).eval()


def _unexpected(model: "PreTrainedModel", files: WeightFiles) -> list[str]:
    """Names in the files that no module has, except those that transformers ignores."""
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    patterns = ignored_patterns(model)
    return [name for name in files.names() if name not in own and not any(re.search(pattern, name) for pattern in patterns)]


def _missing(model: "PreTrainedModel", files: WeightFiles) -> list[str]:
    stored = set(files.names())
    return [places[0][2] for places in parameter_places(model) if not any(name in stored for _, _, name in places)]


def _fits(model: "PreTrainedModel", files: WeightFiles) -> bool:
    # such models load with mixed dtypes, which filling in one dtype would change
    plain = not any(getattr(model, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    buffers = (module for module in model.modules() if any(True for _ in module.named_buffers(recurse=False)))
    return (
        plain
        and all(_is_rotary(module) for module in buffers)
        and not _missing(model, files)
        and not _unexpected(model, files)
        and all(files.dtype(name) is not None for name in files.names())
        # last in the chain: the only test that reads values
        and all(_same(names, files) for names in _stored_twice(model, files))
    )


def _stored_twice(model: "PreTrainedModel", files: WeightFiles) -> Iterator[list[str]]:
    """Names of each tied weight that the files hold more than once."""
    stored = set(files.names())
    for places in parameter_places(model):
        names = [name for _, _, name in places if name in stored]
        if len(names) > 1:
            yield names


def _same(names: list[str], files: WeightFiles) -> bool:
    """Whether the stored copies of a tied weight are equal; transformers unties copies that differ."""
    first, *others = (files.read(name) for name in names)
    return all(torch.equal(first, other) for other in others)


def _check(path: str | Path, model: "PreTrainedModel", files: WeightFiles) -> None:
    """Raise the errors of ``load_model`` that need only names and shapes."""
    stored = set(files.names())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False) if name in stored}
    report = {
        "missing_keys": set(_missing(model, files)),
        "unexpected_keys": set(_unexpected(model, files)),
        "mismatched_keys": {(name, files.shape(name), shape) for name, shape in shapes.items() if files.shape(name) != shape},
        "error_msgs": [],
    }
    check_report(path, model, report)
