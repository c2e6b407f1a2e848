"""A model with a LoRA adapter merged into it, as a model folder in the cache: made once, and named by what it is made of."""

import re
from pathlib import Path

from ..common.cache_folder import cache_dir
from ..common.errors import UserError
from ..common.files import sha256_json
from ..common.hash_cache import cached_sha256
from ..common.locks import waiting_for
from ..common.quiet import say_on_stderr
from .adapter_files import WEIGHTS, Adapter
from .adapter_merge import open_adapted
from .hub import model_name
from .imported import write_imported
from .model_folder import content_hash
from .refused_inputs import ADAPTER

VERSION = 1
"""Raised when the same files give other numbers than before."""


def check_adapter(adapter: str, key: str) -> None:
    """Raise UserError, which names the recipe's ``key``, unless ``adapter`` is a folder with an adapter that can be merged."""
    place = Path(adapter).expanduser()
    if not place.is_dir():
        raise UserError(f"{key}: {adapter} is no folder; give the folder of a LoRA adapter, as save_pretrained of peft writes it")
    try:
        Adapter(place)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def adapted_folder(base: str, adapter: str, revision: str | None = None) -> Path:
    """The folder of ``base`` with ``adapter`` merged into it, as ``decoct import BASE --adapter ADAPTER`` writes it.

    Args:
        base: Model folder, GGUF file or hub id.
        adapter: Folder of the adapter.
        revision: Hub revision of ``base``.

    Raises:
        UserError: see ``open_adapted`` and ``write_imported``, or the cache cannot be written.
    """
    place = Path(adapter).expanduser().resolve()
    # an adapter may bring a tokenizer of its own
    files = [place / ADAPTER, place / WEIGHTS, *sorted(place.glob("tokenizer*"))]
    made_of = {file.name: cached_sha256(file) for file in files if file.is_file()}
    key = sha256_json({"base": content_hash(base, revision), "adapter": made_of, "version": VERSION})
    # the last part is what reports call the model; a name of other letters could not be a folder everywhere
    name = "-with-".join(re.sub(r"[^\w.-]", "-", one.removesuffix(".gguf"))[-80:] for one in (model_name(base), place.name))
    folder = cache_dir() / "imports" / key[:32]
    if (made := _made(folder)) is not None:
        return made
    folder.mkdir(parents=True, exist_ok=True)
    with waiting_for(folder.with_name(f"{folder.name}.lock"), f"merges {adapter}", say_on_stderr):
        # asked again: the process that held the lock may have made it
        return _made(folder) or write_imported(folder / name, open_adapted(base, place, revision=revision))


def _made(folder: Path) -> Path | None:
    """The merged model in ``folder``, which keeps the name that it was made under; None if there is none yet."""
    # what is being written has a hidden name
    return next((one for one in sorted(folder.glob("*")) if one.is_dir() and not one.name.startswith(".")), None)
