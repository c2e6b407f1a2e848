"""A model folder from a GGUF file: finding the file, opening it as a source, and its place in the cache."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..common.cache_folder import cache_dir
from ..common.errors import UserError
from ..common.files import atomic_directory, sha256_json
from ..common.hash_cache import cached_sha256
from ..common.locks import waiting_for
from ..common.quiet import quiet_transformers, say_on_stderr
from ..gguf.fields import Fields
from ..gguf.parts import part_files
from ..gguf.source import GgufSource
from ..gguf.tokenizer import tokenizer_of
from .config_checks import check_depth, check_numbers
from .imported import ImportSource, check_fits, write_config, write_imported
from .meta import meta_model
from .older_readers import mend_tokenizer_config
from .record import write_record
from .stored_names import stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

VERSION = 1
"""Raised when the same file gives other numbers than before."""
_FILES_VERSION = 2
"""Raised when an import writes other files beside the numbers: what the cache holds is made again, and finished stages stay valid."""
Part = Literal["config", "tokenizer", "weights"]
"""How much of the model folder is needed; each part includes those before it."""
_ENDS = (".eos_token_id", ".eot_token_id", ".eom_token_id")
_SAMPLING = {"temp": "temperature", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty", "top_k": "top_k"}


def open_gguf(file: Path, tokenizer: "PreTrainedTokenizerBase | None" = None) -> ImportSource:
    """Open a GGUF file and check everything but the values.

    Args:
        file: The file.
        tokenizer: Tokenizer to use in place of the file's own.

    Raises:
        UserError: the file is damaged, of an unknown architecture, a part without the others, needs a package for its blocks, has weights
            that do not fit its metadata, or a tokenizer that cannot be rebuilt.
    """
    opened = GgufSource(file)
    config = _config(opened)
    # before a run starts and not in the middle of reading
    opened.check_types()
    # weights of the same file under their names in transformers' files
    weights = {weight.name: weight for weight in opened.weights}
    model = meta_model(config)
    source = ImportSource(
        what=str(file),
        config=config,
        model_class=type(model).__name__,
        weights={name: (weight.dtype, weight.shape) for name, weight in weights.items()},
        read=lambda name: opened.read(weights[name]),
        write_others=lambda folder: _write_others(folder, opened, tokenizer),
        facts={},
    )
    # by the names that transformers would write, which differ from module names in some families
    check_fits(source, model, {name: tuple(tensor.shape) for name, tensor in stored_tensors(model).items()})
    return source


def import_gguf(file: Path, target: Path, dtype: Any = None, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Mapping[str, Any]:
    """Write the model folder of a GGUF file; returns where its weights come from.

    Raises:
        UserError: as ``open_gguf`` and ``write_imported``.
    """
    source = open_gguf(file, tokenizer)
    # taken only for an import that is kept: the hashes read whole files
    facts = GgufSource(file).facts([cached_sha256(part) for part in part_files(file)])
    source.facts.update(facts)
    write_imported(target, source, dtype)
    return facts


def gguf_content(file: Path) -> str:
    """Hex sha256 of what the numbers of the imported model depend on: the bytes of the file, and this version of the import."""
    first, *others = map(cached_sha256, part_files(file))
    # a file alone keeps the hash that it had before parts were read
    return sha256_json({"gguf": first, **({"parts": others} if others else {}), "import": VERSION})


def cached_folder(file: Path, part: Part) -> Path:
    """The folder in the cache that holds a GGUF file as a model folder, made if it is missing.

    Config and tokenizer depend on the header alone, so that a plan reads no weights.

    Raises:
        UserError: as ``import_gguf``, or the cache cannot be written.
    """
    if part == "weights":
        return _cached(gguf_content(file), file, lambda target: import_gguf(file, target))
    opened = GgufSource(file)
    # config and tokenizer depend on the header alone, so the weights need not be hashed
    others = [one.header_sha256 for one in opened.files[1:]]
    key = sha256_json({"header": opened.file.header_sha256, **({"parts": others} if others else {}), "import": VERSION, "part": part})
    return _cached(key, file, lambda target: _write_head(opened, target, part))


def _cached(key: str, file: Path, make: Any) -> Path:
    target = cache_dir() / "imports" / sha256_json({"key": key, "files": _FILES_VERSION})[:32]
    if not target.is_dir():
        with waiting_for(target.with_name(f"{target.name}.lock"), f"imports {file}", say_on_stderr):
            # asked again: the process that held the lock may have made it
            if not target.is_dir():
                make(target)
    return target


def _write_head(opened: GgufSource, target: Path, part: Part) -> None:
    """Config, and the tokenizer if it is asked for; without weights."""
    config = _config(opened)
    source = ImportSource(
        what=str(opened.file.path), config=config, weights={}, read=lambda name: opened.read(opened.weights[0]),
        write_others=lambda folder: None, facts={},
    )  # fmt: skip
    # config.json names the dtype of the weights that an import would write
    planned = {weight.name: (str(weight.dtype).removeprefix("torch."), weight.shape) for weight in opened.weights}
    with atomic_directory(target) as folder:
        write_config(folder, source, planned)
        if part == "tokenizer":
            _write_others(folder, opened, None)
        write_record(folder, {"kind": "import", "base_model": opened.file.path.name})


def _config(opened: GgufSource) -> "PreTrainedConfig":
    from transformers import AutoConfig

    where = opened.file.path
    # before transformers sees it: some configs build lists with one entry per layer
    check_numbers(opened.config, where)
    check_depth(opened.config, len(opened.weights), where)
    try:
        with quiet_transformers():
            return AutoConfig.for_model(**opened.config)
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{where}: transformers refuses its numbers: {first}; the file is damaged or of an unknown kind") from error


def _write_others(folder: Path, opened: GgufSource, tokenizer: "PreTrainedTokenizerBase | None") -> None:
    tokenizer = tokenizer or tokenizer_of(opened.fields, opened.rows)
    tokenizer.save_pretrained(folder)
    mend_tokenizer_config(folder / "tokenizer_config.json")
    _write_generation(folder, opened)


def _write_generation(folder: Path, opened: GgufSource) -> None:
    """Tokens that end a text, and llama.cpp's sampling defaults."""
    from transformers import GenerationConfig

    fields, given = opened.fields, opened.config
    ends = [fields.whole(f"tokenizer.ggml{key}", None, least=0) for key in _ENDS]
    # dict.fromkeys: the same id under two keys counts once, in order
    ids = [index for index in dict.fromkeys(ends) if index is not None and index < opened.rows]
    found: dict[str, Any] = {name: given[name] for name in ("bos_token_id", "pad_token_id") if given.get(name) is not None}
    found |= _sampling(fields)
    # transformers' form: a number, a list, or nothing
    eos: Any = ids[0] if len(ids) == 1 else ids or None
    with quiet_transformers():
        GenerationConfig(**found, eos_token_id=eos).save_pretrained(folder)


def _sampling(fields: Fields) -> dict[str, Any]:
    """llama.cpp's sampling defaults as transformers takes them: both accept numbers that the other refuses."""
    found: dict[str, Any] = {}
    for key, name in _SAMPLING.items():
        place = f"general.sampling.{key}"
        # -1e30: any finite number, since only a penalty has no meaning at or below 0
        value = fields.number(place, None, above=0.0 if name == "repetition_penalty" else -1e30)
        if value is None:
            continue
        if name == "top_k":
            if not value.is_integer():
                raise fields.error(place, value, "a whole number")
            # llama.cpp: all tokens from 0 down; transformers takes 0 alone for that, and no float
            value = max(int(value), 0)
        elif name in ("top_p", "min_p"):
            # llama.cpp: off beyond these ends
            value = min(max(value, 0.0), 1.0)
        found[name] = value
    if found.get("temperature", 1.0) <= 0:
        # the likeliest token: transformers stores no settings of a choice that is not made
        return {"do_sample": False, **{name: value for name, value in found.items() if name == "repetition_penalty"}}
    # without do_sample transformers would ignore the sampling settings
    return {**found, "do_sample": True} if found else {}
