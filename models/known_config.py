"""Configs of common families without transformers, whose import takes longer than a whole plan.

``config_defaults.json`` has the fields of their config classes with defaults and types, as read from one minor version of transformers
(``benchmarks/config_defaults.py``). What a config class derives stands here. Whatever is unusual is left to transformers, with its checks,
warnings and errors; ``tests/models/test_known_config.py`` compares the two.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from .common.light_configs import transformers_version

_THETA = 10_000.0
_DTYPES = ("float32", "float16", "bfloat16")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_LLAMA3 = {"rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
# fields of no class by which transformers changes others, besides the names that every config has
_UNUSUAL = (
    "attn_implementation", "experts_implementation", "partial_rotary_factor", "original_max_position_embeddings", "num_heads", "embed_dim",
    "text_config", "text_encoder", "decoder", "generator", "layer_types", "mlp_layer_types", "mtp_layer_types", "quantization_config",
)  # fmt: skip


class KnownConfig:
    """The attributes of a transformers config that a plan reads: all but its dtype and the labels of classifiers."""

    def __init__(self, model_type: str, fields: Mapping[str, Any]) -> None:
        self.model_type = model_type
        self.name_or_path = ""
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        # it is here to tell type checkers that fields are attributes
        raise AttributeError(name)

    def get_text_config(self) -> "KnownConfig":
        """The config itself, as for every model of text alone."""
        return self


def known_config(fields: Mapping[str, Any]) -> KnownConfig | None:
    """The config of plain fields (``config.json``, ``student.config``), or None where transformers has to read them.

    Args:
        fields: Fields with ``model_type``; their sizes are checked already (``folder.config_checks.check_numbers``). Not changed.
    """
    recorded = _recorded()
    # another release may have other defaults
    if recorded["transformers"] != ".".join(transformers_version().split(".")[:2]):
        return None
    kind = fields.get("model_type")
    known: dict[str, Any] | None = recorded["families"].get(kind) if isinstance(kind, str) else None
    if known is None:
        return None
    given = {name: value for name, value in fields.items() if name != "model_type"}
    # a dtype decides no size; an unusual one is transformers' to judge
    if any(given.pop(name, None) not in (None, *_DTYPES) for name in ("dtype", "torch_dtype")):
        return None
    # fields of older configs, which transformers turns into rope_parameters
    theta, scaling = given.pop("rope_theta", _THETA), given.pop("rope_scaling", None)
    if not all(_usual(name, value, known, recorded["reserved"]) for name, value in given.items()):
        return None
    # defaults first, as the class would fill them in
    values = {name: field["default"] for name, field in known.items()} | given
    values["rope_parameters"] = _rope(scaling or values["rope_parameters"], theta, values["max_position_embeddings"])
    config = KnownConfig(str(kind), values)
    _derive(config)
    # None: transformers reads it, and warns or refuses
    return config if values["rope_parameters"] is not None and _consistent(config) else None


@cache
def _recorded() -> dict[str, Any]:
    return json.loads(resources.files("decoct.models").joinpath("config_defaults.json").read_text(encoding="utf-8"))


def _usual(name: str, value: Any, known: Mapping[str, Any], reserved: list[str]) -> bool:
    """Whether transformers would take the value as it is."""
    if name in known:
        return any(_is(value, kind) for kind in known[name]["types"])
    # fields that no class knows are kept as they are, unless they are the name of something else
    return value is None or (type(value) in (bool, int, float, str) and not name.startswith("_") and name not in (*reserved, *_UNUSUAL))


def _is(value: Any, kind: str) -> bool:
    # exact types: a bool is no int here
    if kind.startswith("list["):
        return type(value) is list and all(_is(item, kind[5:-1]) for item in value)
    return type(value).__name__ == kind


def _rope(given: Any, theta: Any, positions: int) -> dict[str, Any] | None:
    """The rotary positions, completed; None where transformers has to look at them."""
    # the older key 'type' is for transformers to rename
    if not isinstance(given, dict | None) or "type" in (given or {}):
        return None
    rope = dict(given or {})
    rope.setdefault("rope_theta", theta)
    rope.setdefault("rope_type", "default")
    numbers = [value for name, value in rope.items() if name != "rope_type"]
    # a number in quotes is for transformers to refuse
    if any(type(value) not in (int, float) for value in numbers):
        return None
    # plain frequencies with further entries are unusual
    if rope["rope_type"] == "default":
        return rope if rope.keys() == {"rope_type", "rope_theta"} else None
    usual = (
        rope["rope_type"] == "llama3"
        and rope.keys() == _LLAMA3
        and rope["factor"] >= 1
        and rope["high_freq_factor"] > rope["low_freq_factor"]
        and type(rope["original_max_position_embeddings"]) is int
        and rope["original_max_position_embeddings"] < positions
    )
    return rope if usual else None


def _derive(config: Any) -> None:
    """Fill in what the config class derives (``__post_init__`` of transformers' classes)."""
    kind = config.model_type
    if kind in ("llama", "mistral") and config.head_dim is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    # without the field every query head has a key/value head of its own
    if config.num_key_value_heads is None:
        config.num_key_value_heads = config.num_attention_heads
    if kind in ("qwen2", "qwen3"):
        config.sliding_window = config.sliding_window if config.use_sliding_window else None
        if config.layer_types is None:
            # the first layers see everything, those from max_window_layers on the window, if there is one
            full = config.num_hidden_layers if config.sliding_window is None else config.max_window_layers
            config.layer_types = [_LAYER_TYPES[index >= full] for index in range(config.num_hidden_layers)]


def _consistent(config: Any) -> bool:
    """Whether transformers accepts the config without a word."""
    layers, head = getattr(config, "layer_types", None), getattr(config, "head_dim", None)
    tokens = [value for name, value in vars(config).items() if name.endswith("_token_id") and isinstance(value, int)]
    return (
        config.hidden_act == "silu"
        and 0.0 <= config.initializer_range <= 1.0
        and not config.is_encoder_decoder
        and not config.output_hidden_states
        and config.return_dict is True
        and all(0 <= token < config.vocab_size for token in tokens)
        and (layers is None or (len(layers) == config.num_hidden_layers and set(layers) <= set(_LAYER_TYPES)))
        # an odd head cannot be rotated in pairs
        and not (head is not None and head > 4 and head % 2)
        and not (config.model_type == "llama" and config.hidden_size % config.num_attention_heads)
    )
