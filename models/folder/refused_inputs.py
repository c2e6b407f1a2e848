"""Refuses folders that cannot be a teacher or student, before any weight is read. Each message names a way that works."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ADAPTER = "adapter_config.json"
# Values of quant_method that transformers can unpack to 16 bits, and therefore 'decoct plain' too.
UNPACKED = ("fp8", "bitsandbytes", "mxfp4", "compressed-tensors")
# parts of the names of sub-configs that are not text
_OTHER_SENSES = ("vision", "audio", "image", "speech", "vq")


def check_files(folder: Path) -> None:
    """Refuse an adapter and packed weights in a local folder.

    Raises:
        UserError: the message names what the folder holds and the command that converts it.
    """
    adapter = folder / ADAPTER
    if adapter.is_file():
        raise UserError(_adapter(folder, adapter, beside=(folder / "config.json").is_file()))
    config = _json(folder / "config.json")
    packed = config.get("quantization_config")
    if packed is not None:
        raise UserError(_packed(folder, packed.get("quant_method") if isinstance(packed, dict) else None))


def check_text_model(path: str | Path, config: "PreTrainedConfig") -> None:
    """Refuse a multimodal model, unless AutoModelForCausalLM loads its text model alone.

    Raises:
        UserError: the message names the command that extracts the text model, if transformers has one.
    """
    from ..families import text_config

    # the class knows its parts; a config without any is text alone
    parts: Any = getattr(type(config), "sub_configs", None) or {}
    text = text_config(config)
    others = [name for name in parts if any(sense in name for sense in _OTHER_SENSES)]
    if text is config and not others:
        return
    # imported late: most configs return above
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    # some families load their text model alone from the whole folder
    build: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if build is not None and build.config_class is not type(config):
        return  # transformers itself loads only the text model
    what = ", ".join(name.removesuffix("_config") for name in others) or "other parts"
    message = f"{path} (model type {config.model_type!r}) is more than a text model: it has {what} beside it, which decoct does not train"
    if text is not config and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{message}. Make its text model first: decoct plain {path} --out TEXT_MODEL")
    raise UserError(f"{message}, and transformers has no text-only form of it; use a text model")


def _adapter(folder: Path, adapter: Path, *, beside: bool) -> str:
    base = _json(adapter).get("base_model_name_or_path")
    if beside:
        return (
            f"{folder} holds an adapter ({ADAPTER}) beside a model, and it is unclear which one to use; move {ADAPTER} and adapter_model.* "
            "away to use the model alone, or into a folder of their own to merge them: decoct import MODEL --adapter ADAPTER --out OUT"
        )
    of = f" of {base}" if isinstance(base, str) and base else ""
    return (
        f"{folder} holds an adapter{of} ({ADAPTER}), not a whole model; merge it into its model first: decoct import {folder} --out MODEL"
    )


def _packed(folder: Path, method: Any) -> str:
    what = f"{folder} holds packed quantized weights (quantization_config in config.json: {method or 'of an unknown kind'})"
    own = (folder / "decoct.json").is_file()
    # an export of decoct has a model folder that it was made from
    if own or method not in UNPACKED:
        return f"{what}, which cannot be trained, pruned or quantized again; give the model folder from before the export" + (
            "" if own else ", or the unquantized model that it was made from"
        )
    loading = (
        " (to hold a teacher in few bits, give its 16-bit model and set teacher.load_in: nf4 or int8)" if method == "bitsandbytes" else ""
    )
    return (
        f"{what}, which are not taken as they are; unpack them to 16 bits first: decoct plain {folder} --out MODEL{loading}, or give the "
        "model that they were made from"
    )


def _json(file: Path) -> dict[str, Any]:
    """Content of the file; {} when it is absent or damaged, which other checks report."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
