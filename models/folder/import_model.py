"""``decoct import``: a plain model folder from a GGUF file, a model with a LoRA adapter, or pickled weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from .adapter_files import Adapter
from .adapter_merge import open_adapted
from .gguf_folder import import_gguf
from .gguf_place import gguf_file
from .hub import local_folder
from .import_card import origin_words
from .imported import write_imported
from .loading import load_tokenizer
from .pickled import open_pickled, pickled_files
from .refused_inputs import ADAPTER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DTYPES = ("fp32", "bf16", "fp16")


def import_model(
    source: str,
    target: Path,
    *,
    adapter: Path | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
) -> str:
    """Write the plain model folder of ``source`` to the new folder ``target``.

    Args:
        source: A .gguf file or a folder with one, a folder with an adapter or with pickled weights; with ``adapter`` any model.
        target: New folder.
        adapter: Folder of a LoRA adapter to merge into ``source``.
        dtype: fp32, bf16 or fp16 for all weights, rounded once; None keeps the exact values.
        tokenizer: Folder or hub id whose tokenizer is used in place of that of a GGUF file.
        revision: Hub revision of ``source``.

    Returns:
        A phrase that says where the weights come from.

    Raises:
        UserError: there is nothing to import, or it cannot be; nothing is written.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"dtype={dtype!r}: the dtypes of imported weights are {', '.join(_DTYPES)}")
    # imports torch, which a wrong word needs not wait for
    wanted = _torch_dtype(dtype)
    file = gguf_file(source)
    if tokenizer is not None and (file is None or adapter is not None):
        raise UserError("--tokenizer goes with a GGUF file alone; other models bring their own tokenizer")
    given: PreTrainedTokenizerBase | None = load_tokenizer(tokenizer) if tokenizer else None
    if file is not None and adapter is None:
        return origin_words(import_gguf(file, target, wanted, given))
    opened = open_adapted(source, adapter, revision=revision) if adapter is not None else _open_alone(source, revision)
    write_imported(target, opened, wanted)
    return origin_words(opened.facts)


def _open_alone(source: str, revision: str | None) -> Any:
    folder = local_folder(source, revision=revision)
    if folder is not None and (folder / ADAPTER).is_file():
        # the adapter names its model, so one argument is enough
        base = Adapter(folder).base
        if base is None:
            raise UserError(f"{folder / ADAPTER} does not say which model it belongs to: decoct import MODEL --adapter {folder} --out OUT")
        return open_adapted(base, folder)
    if folder is not None and pickled_files(folder):
        return open_pickled(folder)
    raise UserError(
        f"{source} is neither a GGUF file nor a folder with an adapter or pickled weights: there is nothing to import; a model folder or "
        "hub id is used as it is (decoct plain makes a text model of one with images or packed weights)"
    )


def _torch_dtype(dtype: str | None) -> Any:
    import torch

    return {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
