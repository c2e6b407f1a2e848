"""Adds a LoRA adapter to the weights of its base model: in fp32, rounded once to the base's dtype, one tensor in memory at a time.

    LoRA     W + s B A                                    s = alpha / r, or alpha / sqrt(r) with rsLoRA
    DoRA     m (W + s B A) / |W + s B A|                  the norm of each output row; m is the adapter's magnitude vector

Weights of ``modules_to_save`` and trained biases replace those of the base.

Source: https://arxiv.org/abs/2106.09685 (LoRA), https://arxiv.org/abs/2312.03732 (rsLoRA), https://arxiv.org/abs/2402.09353 (DoRA).
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..common.files import sha256_file
from .adapter_files import WEIGHTS, Adapter, Change
from .imported import ImportSource
from .loading import find_model_folder, load_config, load_tokenizer, meta_model
from .model_folder import content_hash
from .refused_inputs import ADAPTER
from .stored_names import stored_names
from .weights import WeightFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GENERATION = "generation_config.json"
Edit = Callable[[Tensor], Tensor]


def open_adapted(base: str, adapter: Path, *, revision: str | None = None) -> ImportSource:
    """A model with an adapter merged into it, as a source.

    Args:
        base: Model folder, GGUF file or hub id.
        adapter: Folder with adapter_config.json and adapter_model.safetensors.
        revision: Hub revision of ``base``.

    Raises:
        UserError: the adapter is damaged, for another model, or of a form that is no sum of matrices. The message names the part.
    """
    opened = Adapter(adapter)
    folder = find_model_folder(base, revision, weights=True)
    files = WeightFiles(folder)
    model = meta_model(load_config(folder))
    edits = _edits(opened, model, files, base)

    def read(name: str) -> Tensor:
        stored = files.read(name)
        # rounded once, from fp32 to the dtype of the base
        return edits[name](stored.to(torch.float32)).to(stored.dtype) if name in edits else stored

    # the adapter's own tokenizer, which may have tokens that were added for it
    own = any(opened.folder.glob("tokenizer*"))
    return ImportSource(
        what=str(adapter),
        config=load_config(folder),
        model_class=type(model).__name__,
        weights={name: (_dtype(files, name), files.shape(name)) for name in files.names()},
        read=read,
        write_others=lambda target: _write_others(target, opened.folder if own else Path(base) if Path(base).exists() else folder, folder),
        facts={
            "format": "adapter",
            "file": f"{opened.folder.name}/{WEIGHTS}",
            "sha256": sha256_file(opened.file),
            "settings": sha256_file(opened.folder / ADAPTER),
            "base": Path(base).name if Path(base).exists() else base,
            "base_content": content_hash(base, revision),
            "rank": opened.settings.get("r"),
        },
    )


def _dtype(files: WeightFiles, name: str) -> torch.dtype:
    dtype = files.dtype(name)
    if dtype is None:
        raise UserError(f"{files.folder}: {name} is stored in integers or 8 bits; give a base model with plain weights")
    return dtype


def _edits(adapter: Adapter, model: "PreTrainedModel", files: WeightFiles, base: str) -> dict[str, Edit]:
    """Name in the base's files -> what the adapter does to that tensor."""
    modules: dict[str, Any] = dict(model.named_modules())
    written, stored = stored_names(model), set(files.names())
    shared = _shared(model)
    edits: dict[str, Edit] = {}

    def add(change: Change, part: str, edit: Edit) -> None:
        name = f"{change.module}.{part}"
        # files hold the name that transformers writes, or that of the module
        place = next((one for one in (written.get(name, name), name) if one in stored), None)
        if name in shared and not _same_everywhere(adapter, change, shared[name]):
            raise UserError(
                f"{adapter.folder}: it changes {name}, which {base} shares with {', '.join(shared[name])} (tied embeddings); one matrix "
                "cannot be both, so the adapter cannot be merged. Untie the base model first, and train the adapter on that"
            )
        # a tied weight is stored once, under its other name
        if place is None and name in shared:
            return
        if place is None:
            raise UserError(f"{adapter.folder}: it changes {name}, which {base} does not have; the adapter is for another model")
        before = edits.get(place)
        # a replaced weight may have an adapter too, which is added to what replaced it
        edits[place] = edit if before is None else lambda values: edit(before(values))

    for change in adapter.changes:
        module = modules.get(change.module)
        if module is None:
            raise UserError(f"{adapter.folder}: it changes the module {change.module}, which {base} does not have; it is for another model")
        for part, name in change.whole.items():
            parameter = getattr(module, part, None)
            if not isinstance(parameter, Tensor) or tuple(parameter.shape) != adapter.shapes[name]:
                shape = tuple(parameter.shape) if isinstance(parameter, Tensor) else "none"
                raise UserError(f"{adapter.file}: {name} has shape {adapter.shapes[name]}, {base} has {shape}; it is for another model")
            # name=name: a closure would see the last name of the loop
            add(change, part, lambda _, name=name: adapter.tensor(name))
        if change.parts:
            _check_matrices(adapter, change, module, base)
            add(change, "weight", lambda weight, change=change, module=module: _merged(adapter, change, module, weight))
        if "b_bias" in change.parts:
            if getattr(module, "bias", None) is None:
                raise UserError(
                    f"{adapter.folder}: lora_bias adds a bias to {change.module}, which has none in {base}; it cannot be merged"
                )
            scale, bias = adapter.scale(change.module), change.parts["b_bias"]
            add(change, "bias", lambda values, scale=scale, bias=bias: values + scale * adapter.tensor(bias))
    return edits


def _shared(model: "PreTrainedModel") -> dict[str, list[str]]:
    """Name of a parameter with several names -> its other names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: [other for other in group if other != name] for group in names.values() if len(group) > 1 for name in group}


def _same_everywhere(adapter: Adapter, change: Change, others: list[str]) -> bool:
    """Whether the adapter replaces every copy of a shared weight by the same values."""
    wholes = {f"{one.module}.weight": one.whole["weight"] for one in adapter.changes if "weight" in one.whole and not one.parts}
    # one value per copy, None where a copy is left as it is
    names = [wholes.get(name) for name in (f"{change.module}.weight", *others)]
    if None in names:
        return False
    first, *rest = (adapter.tensor(str(name)) for name in names)
    return all(torch.equal(first, one) for one in rest)


def _is_transposed(module: nn.Module) -> bool:
    # GPT-2's Conv1D stores [in, out]
    return type(module).__name__ == "Conv1D"


def _check_matrices(adapter: Adapter, change: Change, module: nn.Module, base: str) -> None:
    weight = getattr(module, "weight", None)
    kinds = nn.Embedding if change.embedding else nn.Linear
    if not isinstance(weight, Tensor) or not (isinstance(module, kinds) or (_is_transposed(module) and not change.embedding)):
        raise UserError(f"{adapter.folder}: {change.module} is a {type(module).__name__} in {base}, to which no matrices can be added")
    rank, (rows, columns) = adapter.rank(change.module), tuple(weight.shape)
    # an embedding's matrices are the other way round
    if _is_transposed(module) or change.embedding:
        rows, columns = columns, rows
    for part, wanted in (("a", (rank, columns)), ("b", (rows, rank))):
        found = adapter.shapes[change.parts[part]]
        if found != wanted:
            raise UserError(
                f"{adapter.file}: {change.parts[part]} has shape {found}; rank {rank} and {change.module} of {base} ask for {wanted}"
            )
    magnitude = change.parts.get("magnitude")
    # a magnitude without DoRA, or DoRA without one, is a mixed-up file
    if bool(magnitude) != adapter.uses_magnitudes or (magnitude and (change.embedding or adapter.shapes[magnitude] != (rows,))):
        raise UserError(f"{adapter.folder}: use_dora and the magnitude vector of {change.module} contradict each other, or it is no linear")


def _merged(adapter: Adapter, change: Change, module: nn.Module, weight: Tensor) -> Tensor:
    a, b = (adapter.tensor(change.parts[part]) for part in ("a", "b"))
    update = adapter.scale(change.module) * (b @ a)
    turned = _is_transposed(module) or change.embedding
    summed = (weight.T if turned else weight) + update
    # arXiv 2402.09353: the norm of each output row becomes the trained magnitude
    if "magnitude" in change.parts:
        magnitude = adapter.tensor(change.parts["magnitude"])
        summed = summed * (magnitude / torch.linalg.vector_norm(summed, dim=1))[:, None]
    return summed.T.contiguous() if turned else summed


def _write_others(target: Path, tokenizer: Path, base: Path) -> None:
    from .older_readers import mend_tokenizer_config

    load_tokenizer(tokenizer).save_pretrained(target)
    mend_tokenizer_config(target / "tokenizer_config.json")
    if (base / _GENERATION).is_file():
        shutil.copyfile(base / _GENERATION, target / _GENERATION)
