"""Config fields that transformers 4 and servers built on it (SGLang, older vLLM) need to read a folder as transformers 5 does.

transformers 5 keeps rotary positions in ``rope_parameters`` and the dtype in ``dtype``. transformers 4 knows neither: it silently takes
its own defaults and predicts other tokens. The older fields are therefore written in addition, unless transformers 5 would then read the
config differently.

Source: ``convert_rope_params_to_dict`` in transformers 5 (what it reads of the older fields), ``configuration_*.py`` of 4.57.
"""

import json
import logging
from pathlib import Path
from typing import Any

from ..common.quiet import quiet_transformers

_logger = logging.getLogger(__name__)
# entries of rope_parameters that have a field of their own in version 4, or are written separately below
_OWN = ("rope_theta", "partial_rotary_factor", "rope_type", "type")
_LOCAL_FREQUENCY = ("gemma3", "gemma3_text", "gemma3n", "gemma3n_text")
_NEOX = ("gpt_neox", "gpt_neox_japanese")
# Classes that transformers 5 writes and 4 lacks -> the one that reads the same tokenizer.json as it is.
_TOKENIZERS = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def older_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that transformers 4 reads instead of ``rope_parameters`` and ``dtype``.

    Args:
        config: Content of a ``config.json`` as transformers 5 writes it.

    Returns:
        ``rope_theta``, ``rope_scaling`` (null for plain frequencies), further fields of the model type, and ``torch_dtype``. Fields that
        the config does not have are left out.
    """
    fields = {"torch_dtype": config["dtype"]} if isinstance(config.get("dtype"), str) else {}
    rope, kind = config.get("rope_parameters"), str(config.get("model_type"))
    if not isinstance(rope, dict) or not rope:
        return fields
    # a dict per kind of attention layer is the newer form; otherwise one set serves all layers
    if not any(isinstance(value, dict) for value in rope.values()):
        return fields | _of_one(rope, config, kind)
    whole, local = rope.get("full_attention") or {}, rope.get("sliding_attention") or {}
    if kind == "modernbert-decoder":
        return fields | {"global_rope_theta": whole.get("rope_theta"), "local_rope_theta": local.get("rope_theta")}
    if kind in _LOCAL_FREQUENCY:
        # Gemma 3: the frequency of local layers has a field of its own
        return fields | _of_one(whole, config, kind) | {"rope_local_base_freq": local.get("rope_theta")}
    # both kinds of layers agree, so one value serves version 4 too
    if whole.get("rope_theta") == local.get("rope_theta") is not None:
        return fields | _of_one(whole, config, kind)
    return fields  # transformers 4 has no model type that can express this


def _of_one(rope: dict[str, Any], config: dict[str, Any], kind: str) -> dict[str, Any]:
    theta, part = rope.get("rope_theta"), rope.get("partial_rotary_factor")
    fields: dict[str, Any] = {"rope_theta": theta, "rope_scaling": _scaling(rope, kind)}
    if kind in _NEOX:
        # GPT-NeoX has other names for base and rotated share
        fields |= {"rotary_emb_base": theta, "rotary_pct": part}
    elif part is not None and "partial_rotary_factor" not in config:
        fields["partial_rotary_factor"] = part
    return fields


def _scaling(rope: dict[str, Any], kind: str) -> dict[str, Any] | None:
    name = rope.get("rope_type") or rope.get("type") or "default"
    if name == "default":
        return None
    if kind.startswith("phi3") and name == "longrope":
        # its class takes exactly these three; the length before scaling is a field of the config
        return {"type": name, "short_factor": rope.get("short_factor"), "long_factor": rope.get("long_factor")}
    # both spellings: releases of version 4 and servers read one or the other
    return {"rope_type": name, "type": name, **{key: value for key, value in rope.items() if key not in _OWN}}


def with_older_fields(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with its ``older_fields``; without them if the installed transformers would then read other numbers."""
    fields = older_fields(config)
    # drop fields from an earlier save, which may be outdated
    plain = {key: value for key, value in config.items() if key not in (*fields, "rope_scaling", "rope_theta")}
    # without rotary positions there is nothing that could be read in two ways
    if not isinstance(config.get("rope_parameters"), dict) or not fields:
        return {**config, **fields}
    full = {**plain, **fields}
    # tried, not assumed: releases of transformers differ in which field wins
    if _read(full) == _read(plain):
        return full
    _logger.warning(
        "no rope_theta beside rope_parameters for model type %s: transformers would read other numbers", config.get("model_type")
    )
    return plain


def _read(config: dict[str, Any]) -> Any:
    """Rotary parameters that the installed transformers reads from a config; the error message if it refuses the config."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    build: Any = CONFIG_MAPPING[kind]
    try:
        with quiet_transformers():
            # as from_json_file does: infinite numbers have a special spelling
            content = build._decode_special_floats(json.loads(json.dumps(config)))
            rope = build.from_dict(content).to_dict().get("rope_parameters")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return _without_type(rope)


def _without_type(rope: Any) -> Any:
    """Drop ``type``, the older name of ``rope_type``, which is present as well."""
    return {key: _without_type(value) for key, value in rope.items() if key != "type"} if isinstance(rope, dict) else rope


def mend_tokenizer_config(file: Path) -> None:
    """Rewrite ``tokenizer_config.json`` so that transformers 4 can read it too. A missing or readable file stays unchanged."""
    if not file.is_file():
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    named = content.get("tokenizer_class")
    changed = {**content, "tokenizer_class": _TOKENIZERS.get(named, named)} if isinstance(named, str) else dict(content)
    extra = changed.get("extra_special_tokens")
    if isinstance(extra, list):
        # version 4 expects a dict here and reads a list from the older key, which version 5 accepts as well
        del changed["extra_special_tokens"]
        changed["additional_special_tokens"] = extra
    if changed != content:
        file.write_text(json.dumps(changed, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
