"""Compares a folder that a cut made with its parent: the config, and each tensor with what the cut takes from the parent."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...models.common.errors import UserError
from ...models.family_map import family_of
from ...models.folder.loading import load_config, load_model
from ...models.folder.model_folder import RECORD
from ...models.folder.safetensors_read import read_header
from ...models.kept_layers import cut_config
from ...models.pruning.kept import Kept
from ...models.pruning.structured import cut
from ...models.sizes import sizes_of
from ..footprint import weight_files
from ..readers.open import open_export

_OF_FILES = ("dtype", "torch_dtype", "transformers_version", "architectures", "_name_or_path", "use_cache", "tie_word_embeddings")
"""Fields of a config that say how a folder was written, or that the weights decide."""
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def parent_problems(path: Path, record: Mapping[str, Any], parent: Path) -> Iterator[tuple[list[str], str]]:
    """(what disagrees, what agrees) of each check; the record agrees with the config and the shapes of the files.

    Raises:
        UserError: the parent is not a model folder of a family with an axis map.
    """
    config = load_config(str(parent))
    family = family_of(config)
    before = sizes_of(config, family)
    if (found := before.record()) != record["parent_shape"]:
        yield [f"{parent} is not the parent: it has {found}, and {RECORD} says {record['parent_shape']}"], ""
        return
    kept = Kept.from_record(record["kept"], family, before.layers)
    expected = cut_config(config, family, kept.sizes(before), kept.layers).to_dict()
    now = load_config(str(path)).to_dict()
    # a student leaves out rows of the vocabulary that its tokenizer does not have
    fewer = {"vocab_size"} if now.get("vocab_size", 0) <= expected.get("vocab_size", 0) else set()
    changed = sorted(key for key in {*expected, *now} - {*_OF_FILES, *fewer} if expected.get(key) != now.get(key))
    yield (
        [f"config.json: {key} is {now.get(key)!r}, and a cut of {parent} has {expected.get(key)!r}" for key in changed],
        f"config.json is that of {parent} but for what the cut changes",
    )
    if not changed and now.get("vocab_size") == expected.get("vocab_size"):
        yield _tensors(path, record, parent, kept)


def _tensors(path: Path, record: Mapping[str, Any], parent: Path, kept: Kept) -> tuple[list[str], str]:
    """Whether each stored tensor is the parent's cut one, which only a repair or local distillation changes."""
    student = cut(load_model(parent, dtype=torch.float32), kept, release=True)
    types = {name: _DTYPES[info.dtype] for file in weight_files(path) for name, info in read_header(file).tensors.items()}
    opened = open_export(path)
    own = student.state_dict()
    if lost := [name for name in types if name not in own]:
        raise UserError(f"{path} has {lost[0]}, which {parent} does not have; give the folder that it was cut from")
    other = [name for name, dtype in types.items() if not torch.equal(own[name].to(dtype).float(), torch.from_numpy(opened.tensor(name)))]
    if not other:
        return [], f"all {len(types)} tensors are those of {parent}, cut as {RECORD} says"
    if record.get("repairs") or record.get("local"):
        return (
            [],
            f"{len(types) - len(other)} of {len(types)} tensors are those of {parent}, cut as {RECORD} says; repairs changed the others",
        )
    return [f"{name} is not the one of {parent}, cut as {RECORD} says" for name in other], ""
