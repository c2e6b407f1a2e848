"""Writes a model folder: the files that ``from_pretrained`` reads, plus ``decoct.json`` with its history and a hash of every file.

The folder is written under a temporary name and then renamed, so it is complete or absent. The files are those of transformers, except
that the config has the dtype that was actually saved and never names code (``auto_map``).
"""

import copy
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import DecoctError, NonFiniteError, UserError
from ..common.files import atomic_directory, sha256_json
from ..common.hash_cache import cached_sha256
from ..common.json_file import read_json
from ..common.quiet import quiet_transformers
from .gguf_folder import gguf_content
from .gguf_place import gguf_file
from .hub import hub_commit, local_folder
from .older_readers import mend_tokenizer_config, with_older_fields
from .record import CONTENT, write_record
from .record import FORMAT as FORMAT
from .record import RECORD as RECORD
from .record import read_record as read_record
from .record import verify_folder_files as verify_folder_files
from .safetensors_write import write_safetensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

MAX_SHARD = "5GB"
_SAMPLING_DIALS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_logger = logging.getLogger(__name__)


def save_model_folder(
    path: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    record: dict[str, Any],
    *,
    state_dict: "Mapping[str, Tensor] | None" = None,
    dtype: "torch.dtype | None",
    extra_tensors: "Mapping[str, Mapping[str, Tensor]] | None" = None,
    write_extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``model`` and ``tokenizer`` to the new folder ``path``. The model in memory keeps its weights, dtype and config.

    Args:
        path: New folder.
        model: Model to write.
        tokenizer: Tokenizer to write; None writes none.
        record: Content of decoct.json; ``format``, ``files`` (name -> sha256) and ``sizes`` are added here.
        state_dict: Weights to write, under the model's names; default: those of the model. Tied weights are written once.
        dtype: Dtype of the written parameters (a cast copy); None keeps their dtypes. Buffers are never cast.
        extra_tensors: Further safetensors files, such as ``{"quant/codes.safetensors": {...}}``.
        write_extra: Called with the temporary folder before the hashes are taken.

    Raises:
        UserError: ``path`` exists, the disk refuses, or the model is remote code that transformers does not know itself.
        NonFiniteError: a weight is NaN or infinite; nothing is written.
    """
    path = Path(path)
    # before the folder is made: a NaN or a wrong name fails without touching the disk
    weights = _weights(model, state_dict, dtype)
    with atomic_directory(path) as folder:
        _write_model(folder, model, weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            mend_tokenizer_config(folder / "tokenizer_config.json")
        # after both save_pretrained calls, which may add code
        _strip_code(folder)
        if tokenizer is not None:
            _check_tokenizer(folder, path, tokenizer)
        for name, tensors in (extra_tensors or {}).items():
            _write_tensors(folder / name, tensors)
        if write_extra is not None:
            write_extra(folder)
        # last: it hashes every file of the folder
        write_record(folder, record)
    return path


def content_hash(path_or_hub_id: str | Path, revision: str | None = None) -> str:
    """Hex sha256 over the names and bytes of config, weights and tokenizer files; for a hub id, over its name and resolved commit.

    The hash does not depend on the path of the folder; that of a GGUF file is over its bytes. README, decoct.json and generation settings
    do not count.

    Raises:
        UserError: the path is not a model folder, or neither the hub nor the cache knows the commit of the hub id.
    """
    if (file := gguf_file(path_or_hub_id)) is not None:
        return gguf_content(file)
    folder = local_folder(path_or_hub_id, revision=revision)
    if folder is None:
        return sha256_json({"hub": str(path_or_hub_id), "commit": hub_commit(str(path_or_hub_id), revision)})
    # its error names what is missing; a folder without a config is no model
    read_json(folder / "config.json")
    return sha256_json({file.relative_to(folder).as_posix(): cached_sha256(file) for pattern in CONTENT for file in folder.glob(pattern)})


def _weights(model: "PreTrainedModel", given: "Mapping[str, Tensor] | None", dtype: "torch.dtype | None") -> "dict[str, Tensor]":
    """A detached state dict for writing: names checked, tied names dropped, parameters cast, all values finite."""
    import torch

    own = model.state_dict()
    weights = {name: tensor.detach() for name, tensor in (own if given is None else given).items()}
    # a name is tied only if the other one is written
    tied = {name: source for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items() if source in weights}
    for name, source in tied.items():
        other = weights.pop(name, None)
        # one of the two would be lost silently
        if other is not None and not torch.equal(other, weights[source]):
            raise DecoctError(f"{name} and {source} are tied in the config but differ; set tie_word_embeddings to false before saving")
    # symmetric difference: missing on either side
    if wrong := (own.keys() - tied.keys()) ^ weights.keys():
        raise DecoctError(f"the weights to save do not have the model's names; missing or unexpected: {', '.join(sorted(wrong)[:5])}")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    seen: set[int] = set()
    for name, tensor in weights.items():
        # two tensors share memory although the class ties nothing: write both, because loading reads both
        if tensor.numel() and tensor.data_ptr() in seen:
            weights[name] = tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        if dtype is not None and name in parameters and tensor.is_floating_point():
            # a copy in the new dtype; the model keeps its own
            weights[name] = tensor = tensor.to(dtype)
        if name in parameters and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NonFiniteError(f"weight {name} holds NaN or infinite numbers (as {tensor.dtype}); the model is not saved")
    return weights


def _write_model(folder: Path, model: "PreTrainedModel", weights: "dict[str, Tensor]") -> None:
    from transformers import CONFIG_MAPPING

    config = model.config
    if model.is_remote_code() and config.model_type not in CONFIG_MAPPING:
        raise UserError(
            f"model type {config.model_type!r} exists only as code in its repository, which decoct never copies into what it saves; "
            "use a model type that transformers knows"
        )
    # the first float that is written: the config names one dtype
    saved = next((tensor.dtype for tensor in weights.values() if tensor.is_floating_point()), model.dtype)
    tied = _tied(model, weights)  # before save_pretrained, which empties the dict
    before = {key: getattr(config, key, None) for key in ("dtype", "architectures")}
    live: Any = model
    generation = getattr(model, "generation_config", None)
    try:
        # save_pretrained refuses inconsistent sampling options, which many published models have
        live.generation_config = _savable(generation)
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD)
    finally:
        live.generation_config = generation
        for key, value in before.items():
            # save_pretrained writes dtype and architectures into the live config
            setattr(config, key, value)
    file = folder / "config.json"
    # transformers writes the dtype of the live model, not of the state dict
    content = json.loads(file.read_text(encoding="utf-8")) | {"dtype": str(saved).removeprefix("torch.")}
    if tied is not None:
        # weights decide: a student may be untied although its config is tied
        for part in (content, content.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = tied
    _edit_json(file, with_older_fields(content))


def _tied(model: "PreTrainedModel", weights: "dict[str, Tensor]") -> bool | None:
    """Whether the written head is tied to the embedding, judged by the written names; None for a model without a head."""
    head: Any = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    return None if name is None or getattr(head, "weight", None) is None else f"{name}.weight" not in weights


def _savable(generation: "GenerationConfig | None") -> "GenerationConfig | None":
    """Generation settings that transformers accepts for writing: sampling options have no effect in greedy decoding and are dropped."""
    if generation is None:
        return None
    try:
        with quiet_transformers():
            generation.validate(strict=True)
    except ValueError:
        generation = copy.deepcopy(generation)
        # a copy: the live settings stay as the user set them
        for dial in _SAMPLING_DIALS if not generation.do_sample else ():
            setattr(generation, dial, None)
    return generation


def _write_tensors(file: Path, tensors: "Mapping[str, Tensor]") -> None:
    if file.suffix != ".safetensors" or file.exists():
        raise DecoctError(f"extra tensors need a new file name ending in .safetensors, not {file.name}")
    file.parent.mkdir(exist_ok=True)
    write_safetensors(file, tensors, {"format": "pt"})


def _edit_json(file: Path, changes: dict[str, Any], drop: str | None = None) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content = {**{key: value for key, value in content.items() if key != drop}, **changes}
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _strip_code(folder: Path) -> None:
    """Remove everything that would run code on loading: ``auto_map`` entries and Python files."""
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            _edit_json(folder / name, {}, drop="auto_map")
    # save_pretrained of some tokenizers copies their code
    for file in folder.glob("*.py"):
        file.unlink()


def _check_tokenizer(folder: Path, path: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that AutoTokenizer restores the saved tokenizer; for some model types it uses another class, which gives a warning."""
    from .loading import load_tokenizer

    # by the way that users take: AutoTokenizer on the written folder
    again = load_tokenizer(folder)
    if again.get_vocab() != tokenizer.get_vocab():
        raise DecoctError(f"the tokenizer written for {path} reads back with another vocabulary; the model is not saved")
    one, two = getattr(tokenizer, "backend_tokenizer", None), getattr(again, "backend_tokenizer", None)
    if one is not None and two is not None and _splitting(one) != _splitting(two):
        _logger.warning(
            "AutoTokenizer reads the tokenizer of %s as %s, which splits text differently from the one it was made with; "
            "a model of another type (such as llama) keeps it",
            path,
            type(again).__name__,
        )


def _splitting(backend: Any) -> list[str]:
    return [str(part) for part in (backend.normalizer, backend.pre_tokenizer)]
