"""Opens any model for answering: model folders, quantized folders, exports, packed weights of other tools, GGUF files.

The model computes what was measured: exports of decoct are rebuilt by the independent reader, without any package of theirs. GGUF files of
others are imported. transformers reads what that reader does not know, with the package that the format needs.
"""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...models.causality import check_causal
from ...models.common.errors import UserError
from ...models.common.quiet import quiet_transformers
from ...models.families import check_head
from ...models.folder.folder_checks import read_json
from ...models.folder.gguf_place import gguf_file
from ...models.folder.loading import find_model_folder, load_model, load_tokenizer
from ...models.folder.meta import not_loadable
from ...models.folder.plain_copy import unpacked_model
from ...models.folder.record import RECORD
from ...models.folder.refused_inputs import UNPACKED
from ...models.tokenizer.vocabulary import effective_vocab, embedding_rows
from ...qat.readers.gguf_model import find_gguf
from ...qat.rebuild import load_exported_model
from ...qat.runtimes.transformers_process import loading_options
from ...trainer.evaluation.model_row import best_device, is_existing_export, open_for_measuring, quant_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PACKAGES = {"gptq": ("optimum", "gptqmodel"), "awq": ("accelerate", "gptqmodel"), "compressed-tensors": ("compressed_tensors",),
             "bitsandbytes": ("bitsandbytes", "accelerate")}  # fmt: skip
"""Import names of the packages that transformers needs for packed weights of each kind."""


@dataclass(frozen=True)
class Opened:
    """A model that can answer, on the device where it computes."""

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    v_eff: int
    """Ids below this one are tokens; a padded head has rows beyond it."""
    context: int | None
    """Tokens of prompt and answer together; None where the model has no limit."""


def open_for_answers(path: str, *, revision: str | None = None, dtype: str = "fp32") -> Opened:
    """Open a model folder, hub id, export or GGUF file, with its tokenizer, on the GPU if there is one.

    Raises:
        UserError: it is no model that can be read here; the message names a missing package, or the verb that converts it.
    """
    if dtype not in _DTYPES:
        raise UserError(f"--dtype={dtype} is not one of {', '.join(_DTYPES)}")
    file = gguf_file(path)
    # decoct's own GGUF export is what was measured, so the independent reader rebuilds it; other GGUF files are imported
    if find_gguf(Path(path)) is not None and is_existing_export(path):
        place = Path(path).parent if Path(path).is_file() else Path(path)
        model, tokenizer = load_exported_model(Path(path)), load_tokenizer(place)
    elif file is not None:
        model, tokenizer = load_model(file, dtype=_DTYPES[dtype]), load_tokenizer(file)
    else:
        folder = find_model_folder(path, revision, weights=True)
        model, tokenizer = _open_folder(path, folder, _DTYPES[dtype]), load_tokenizer(folder)
    live: Any = model
    # the dtype first: half of the bytes go to the GPU
    live.to(_DTYPES[dtype]).to(best_device()).eval()
    # rows beyond the tokenizer's ids are padding, which must never be drawn
    rows = embedding_rows(model.config)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Opened(_name(path), model, tokenizer, effective_vocab(tokenizer, rows), limit if isinstance(limit, int) else None)


def _name(path: str) -> str:
    """A short name: the end of a path, with the folder above where that alone says little (model, 03-export/gguf). A hub id stays."""
    if not Path(path).exists():
        return path
    place = Path(path).absolute()
    # both are '' for the root
    name, above = place.name, place.parent.name
    says_little = name in ("model", "model.gguf") or re.match(r"\d\d-", above)
    return f"{above}/{name}" if says_little and above else name or str(place)


def _open_folder(path: str, folder: Path, dtype: torch.dtype) -> "PreTrainedModel":
    packed = read_json(folder / "config.json").get("quantization_config")
    if isinstance(packed, dict):
        return _open_packed(path, folder, packed)
    # exact in fp32, as it was measured; ``open_for_answers`` converts it to --dtype
    if dtype == torch.float32 or quant_record(str(folder)):
        return open_for_measuring(str(folder))
    model = load_model(folder, dtype=dtype)
    check_head(model)
    check_causal(model, f"the model in {path}")
    return model


def _open_packed(path: str, folder: Path, packed: dict[str, Any]) -> "PreTrainedModel":
    """Packed weights: by the independent reader, or by transformers where other tools made what that reader does not know."""
    method = str(packed.get("quant_method"))
    try:
        return load_exported_model(folder)
    except UserError as ours:
        # a folder of decoct that its own reader refuses is damaged
        if (folder / RECORD).is_file():
            raise
        # find_spec looks for a package without importing it, which takes seconds
        if missing := [name for name in _PACKAGES.get(method, ()) if importlib.util.find_spec(name) is None]:
            raise UserError(
                f"{path} holds weights packed by {method}, and transformers needs {' and '.join(missing)} to read them, which "
                f"{'is' if len(missing) == 1 else 'are'} not installed here: pip install {' '.join(missing).replace('_', '-')} "
                f"(decoct's own reader does not know them: {ours})"
            ) from ours
    return unpacked_model(path, folder, packed) if method in UNPACKED else _by_transformers(path, folder, **loading_options(str(folder)))


def _by_transformers(path: str, folder: Path, **options: Any) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        with quiet_transformers():
            return load(folder, dtype=torch.float32, local_files_only=True, **options)
    except MemoryError:
        raise
    # any error: each quantization package raises its own
    except Exception as error:
        raise not_loadable(path, "a causal language model", error) from error
