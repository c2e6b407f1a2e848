"""Makes a plain 16-bit text model from a multimodal model, an adapter, or fp8 or bitsandbytes weights.

The text part of a multimodal model is compared with the whole model on a few tokens. transformers unpacks weights.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common.errors import DecoctError, UserError
from ..common.files import clean_leftovers
from ..common.quiet import quiet_transformers
from .adapter_files import Adapter
from .adapter_merge import open_adapted
from .folder_checks import read_json
from .gguf_place import gguf_file
from .hub import local_folder
from .imported import write_imported
from .load_report import check_report
from .loading import find_model_folder, load_config, load_tokenizer
from .model_folder import save_model_folder
from .refused_inputs import ADAPTER, UNPACKED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 16


def make_plain(source: str, target: Path, *, revision: str | None = None) -> str:
    """Write the plain text model of ``source`` to the new folder ``target``, in its own dtype (packed weights: bf16).

    Args:
        source: Model folder or hub id: a multimodal model, a peft adapter, or packed weights.
        target: New folder.
        revision: Hub revision of ``source``.

    Returns:
        A phrase that describes what was done.

    Raises:
        UserError: ``source`` is already a plain text model, or cannot be converted to one.
        DecoctError: the text part alone gives other logits than the whole model; nothing is written.
    """
    if gguf_file(source) is not None:
        raise UserError(f"{source} is a GGUF file; make a model folder of it: decoct import {source} --out {target}")
    folder = local_folder(source, revision=revision)
    if folder is not None and (folder / ADAPTER).is_file():
        base = Adapter(folder).base
        if base is None:
            raise UserError(f"{folder / ADAPTER} does not say which model it belongs to: decoct import MODEL --adapter {folder} --out OUT")
        write_imported(target, open_adapted(base, folder))
        return "adapter merged into its model"
    folder = find_model_folder(source, revision, weights=True)
    packed = read_json(folder / "config.json").get("quantization_config")
    config = load_config(folder)
    if isinstance(packed, dict):
        what = f"weights of {packed.get('quant_method')} unpacked to bf16"
        model = unpacked_model(source, folder, packed)
    elif config.get_text_config() is not config:
        what, model = _text_model(source, folder)
    else:
        raise UserError(f"{source} is a plain text model already (model type {config.model_type!r}); use it as it is")
    # of an earlier copy that was killed: it may have the size of a model
    clean_leftovers(target.parent)
    save_model_folder(target, model, load_tokenizer(folder), {"kind": "plain", "base_model": Path(source).name, "plain": what}, dtype=None)
    return what


def _quietly(source: str, load: Callable[[], Any]) -> Any:
    try:
        with quiet_transformers():
            return load()
    except (MemoryError, UserError):
        raise
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{source} cannot be made a plain model: {first}") from error


def unpacked_model(source: str, folder: Path, packed: dict[str, Any]) -> "PreTrainedModel":
    """The model of packed weights that transformers can unpack (``UNPACKED``), in bf16.

    Args:
        source: Name in messages.
        folder: Its folder, not one that decoct wrote.
        packed: ``quantization_config`` of its config.json.

    Raises:
        UserError: they are of another kind, or transformers cannot unpack them here.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config

    method = packed.get("quant_method")
    # an export of decoct has a model folder that it was made from
    if method not in UNPACKED or (folder / "decoct.json").is_file():
        raise UserError(
            f"{source} holds packed weights ({method}), which are not unpacked here; give the unquantized model that they were made from"
        )
    settings = {
        "fp8": lambda: FineGrainedFP8Config(dequantize=True),
        "mxfp4": lambda: Mxfp4Config(dequantize=True),
        "compressed-tensors": lambda: CompressedTensorsConfig(dequantize=True),
    }
    how = {"quantization_config": settings[method]()} if method in settings else {}
    load: Any = AutoModelForCausalLM.from_pretrained
    model, report = _quietly(
        source,
        lambda: load(folder, dtype=torch.bfloat16, use_safetensors=True, local_files_only=True, output_loading_info=True, **how),
    )
    check_report(source, model, report)
    # bitsandbytes has no option to unpack while loading
    if method == "bitsandbytes":
        model = _quietly(source, lambda: model.dequantize(dtype=torch.bfloat16))
    # some loaders leave single layers packed without an error
    left = [name for name, parameter in model.named_parameters() if parameter.dtype not in (torch.bfloat16, torch.float16, torch.float32)]
    if left:
        raise UserError(f"{source} cannot be made a plain model: {left[0]} stays packed ({method}); give the model it was made from")
    # a fresh model: the loaded one keeps its quantizer and would be saved as quantized
    config: Any = load_config(folder)
    # else the fresh model would be built packed again
    del config.quantization_config
    with quiet_transformers():
        plain: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # strict: a name that is left over or missing raises
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain.eval()


def _text_model(source: str, folder: Path) -> "tuple[str, PreTrainedModel]":
    """The text model inside a multimodal one, with the same logits."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    load: Any = AutoModelForMultimodalLM.from_pretrained
    whole, report = _quietly(
        source, lambda: load(folder, dtype="auto", use_safetensors=True, local_files_only=True, output_loading_info=True)
    )
    check_report(source, whole, report)
    head = whole.get_output_embeddings()
    config = copy.deepcopy(whole.config.get_text_config())
    # the nested config may disagree with the whole model: the actual weights decide
    config.tie_word_embeddings = head is not None and head.weight is whole.get_input_embeddings().weight
    with quiet_transformers():
        inner = whole.get_decoder()
        try:
            text: Any = AutoModelForCausalLM.from_config(config, dtype=whole.dtype)
        except ValueError as error:
            raise UserError(
                f"{source}: transformers has no text-only form of model type {whole.config.model_type!r} ({config.model_type}); "
                "use a text model"
            ) from error
    if text.base_model.state_dict().keys() != inner.state_dict().keys():
        raise UserError(f"{source}: its text part is not a {type(text.base_model).__name__} by its weights' names; use a text model")
    text.base_model.load_state_dict(inner.state_dict())
    # a tied head comes with the embedding
    if head is not None and not config.tie_word_embeddings:
        text.get_output_embeddings().load_state_dict(head.state_dict())
    text.generation_config = whole.generation_config
    _same_logits(source, whole.eval(), text.eval())
    return f"text model of a {whole.config.model_type}", text


@torch.no_grad()
def _same_logits(source: str, whole: Any, text: Any) -> None:
    # from 1 on: id 0 is often padding, which some models mask
    ids = torch.arange(1, 1 + _TOKENS).remainder(text.config.vocab_size)[None]
    expected, found = (model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits for model in (whole, text))
    # exact: the same weights in the same operations must give the same bits
    if not torch.equal(expected, found):
        raise DecoctError(
            f"{source}: the text model alone predicts something else (largest difference {(expected - found).abs().max():.3g}); "
            "nothing was written"
        )
